"""Data folders behind a URL or a command: the same batches, whatever the network does, or one clear line."""

import dataclasses
import errno
import multiprocessing
import os
import signal
import socket
import sys
import time

import numpy as np
import pytest
from flaky_server import FlakyServer, stream_tokens

from megatron_bit.config import RemoteConfig, load_config
from megatron_bit.data import remote as module
from megatron_bit.data.batches import BatchStream
from megatron_bit.data.cache import ShardCache
from megatron_bit.data.corpus import Corpus
from megatron_bit.data.manifest import FILE_NAME, load_manifest
from megatron_bit.data.stream import read_shard
from megatron_bit.errors import UserError
from megatron_bit.io.files import write_atomic

SHARDS = [333, 5, 128, 256, 90, 400]


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    monkeypatch.setattr(module.random, "random", lambda: -0.49)


@pytest.fixture
def serve():
    servers = []

    def start(folder, fault=lambda file, request: ""):
        servers.append(FlakyServer(folder, fault))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def options(tmp_path, **changes):
    return RemoteConfig(**{"cache": str(tmp_path / "cache"), "timeout_seconds": 5.0, "attempts": 4, **changes})


def batches(manifest, steps=10, block_size=1, cursor=0, **kwargs):
    stream = BatchStream(
        Corpus.of(manifest, block_size), "train", seq_length=10, seed=5, global_batch_size=12, micro_batch_size=12,
        dp_rank=0, dp_size=1, shuffle_shards=2, **kwargs,
    )  # fmt: skip
    iterator = stream.steps(cursor)
    found = np.concatenate([next(iterator)[0].tokens for _ in range(steps)])
    stream.close()
    return found


@pytest.mark.parametrize("fault", ["", "drop", "busy", "garble"])
def test_a_url_gives_the_batches_of_the_folder(make_data, serve, tmp_path, fault):
    """Every file fails twice; the third time it comes. (A manifest has no hash to tell that it is garbled.)"""
    local = make_data(SHARDS)
    whole = FILE_NAME if fault == "garble" else ""
    server = serve(local.folder, lambda file, request: fault if request < 3 and file != whole else "")
    manifest = load_manifest(server.url, options=options(tmp_path))
    assert manifest == dataclasses.replace(local, folder=manifest.folder)
    np.testing.assert_array_equal(batches(manifest), batches(local))
    tars = {shard.file for shard in local.split("train").shards if shard.tokens >= 10}
    assert {file: server.served[file] for file in tars} == dict.fromkeys(tars, 3 if fault == "garble" else 1)
    np.testing.assert_array_equal(batches(manifest, block_size=5), batches(local, block_size=5))


def test_what_is_cached_is_not_fetched_again_and_stays_within_the_limit(make_data, serve, tmp_path):
    local = make_data([2000] * 8)
    server = serve(local.folder)
    size = local.split("train").shards[0].size
    small = options(tmp_path, cache_gib=4.5 * size / 2**30, workers=1)
    manifest = load_manifest(server.url, options=small)
    np.testing.assert_array_equal(batches(manifest, 200), batches(local, 200))
    cached = [entry for entry in os.scandir(tmp_path / "cache" / "files") if entry.is_file()]
    assert 0 < sum(entry.stat().st_size for entry in cached) <= 4.5 * size
    large = load_manifest(server.url, options=options(tmp_path, cache=str(tmp_path / "large")))
    batches(large, 200)
    before = server.served.copy()
    batches(load_manifest(server.url, options=options(tmp_path, cache=str(tmp_path / "large"))), 200)
    assert server.served - before == {FILE_NAME: 1}


def test_shards_are_fetched_before_they_are_needed(make_data, serve, tmp_path):
    local = make_data([2000] * 8)
    server = serve(local.folder)
    manifest = load_manifest(server.url, options=options(tmp_path))
    stream = BatchStream(
        Corpus.of(manifest), "train", seq_length=10, seed=5, global_batch_size=2, micro_batch_size=2, dp_rank=0,
        dp_size=1, shuffle_shards=2, prefetch=0,
    )  # fmt: skip
    next(stream.steps(0))
    ahead = {manifest.split("train").shards[i].file for i in stream.samples.orders[0].ahead(0)}
    deadline = time.monotonic() + 10
    while not ahead <= server.served.keys() and time.monotonic() < deadline:
        time.sleep(0.02)
    stream.close()
    tars = {file for file in server.served if file.endswith(".tar")}
    assert tars == ahead and len(ahead) == 4  # this window and the next, and nothing else


def test_processes_share_the_cache_and_fetch_once(make_data, serve, tmp_path):
    local = make_data(SHARDS)
    server = serve(local.folder, lambda file, request: "drop" if request == 1 else "")
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        found = pool.starmap(stream_tokens, [(server.url, str(tmp_path / "cache"))] * 3)
    assert found[0] == found[1] == found[2] and len(set(found[0])) > 1
    assert all(count == 1 for file, count in server.served.items() if file.endswith(".tar"))


def test_a_process_killed_while_it_fetches_blocks_nobody(make_data, serve, tmp_path):
    local = make_data([2000])
    server = serve(local.folder, lambda file, request: "stall" if file.endswith(".tar") and request == 1 else "")
    process = multiprocessing.get_context("spawn").Process(target=stream_tokens, args=(server.url, str(tmp_path / "c")))
    process.start()
    deadline = time.monotonic() + 30
    tar = local.split("train").shards[0].file
    while not server.requests[tar] and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(stream_tokens(server.url, str(tmp_path / "c"))) == 6


def refused(tmp_path, url, message, **changes):
    with pytest.raises(UserError, match=message) as caught:
        manifest = load_manifest(url, options=options(tmp_path, **changes))
        batches(manifest, prefetch=0)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_had_is_one_clear_line(make_data, serve, tmp_path):
    local = make_data(SHARDS)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        refused(tmp_path, url, rf"{url}/manifest.json cannot be fetched in 2 attempts", attempts=2)
    server = serve(local.folder, lambda file, request: "stall" if file.endswith(".tar") else "")
    begin = time.monotonic()
    refused(tmp_path, server.url, r"s\d-000000.tar cannot be fetched in 2 attempts", attempts=2, timeout_seconds=0.5)
    assert time.monotonic() - begin < 10
    garbling = serve(local.folder, lambda file, request: "garble" if file.endswith(".tar") else "")
    refused(tmp_path, garbling.url, r"SHA-256 [0-9a-f]{64}, the manifest says [0-9a-f]{64}")
    (local.folder / "s0-000000.tar").unlink()
    missing = serve(local.folder)
    refused(tmp_path, missing.url, r"s0-000000.tar does not exist")
    assert missing.requests["s0-000000.tar"] <= 2  # by the reader and ahead of it: no attempts in vain
    refused(tmp_path, f"{missing.url}/other", r"other/manifest.json does not exist")
    refused(tmp_path, "nothing://x/y", r"nothing")


def test_a_command_is_run_without_a_shell(make_data, tmp_path):
    local = make_data(SHARDS)
    url = f"pipe:cat {local.folder}/{{file}}"
    manifest = load_manifest(url, options=options(tmp_path))
    np.testing.assert_array_equal(batches(manifest), batches(local))
    refused(tmp_path, "pipe:cat nothing", "as {file}")
    refused(tmp_path, f"pipe:cat {tmp_path}/{{file}}", r"manifest.json\) cannot be fetched.*exit code 1.*No such file")
    refused(tmp_path, f"{url}; touch {tmp_path / 'pwned'}", "exit code")
    assert not (tmp_path / "pwned").exists()
    refused(tmp_path, "pipe:no-such-program {file}", "does not exist|No such file")
    slow = f"pipe:{sys.executable} -c 'import time; time.sleep(30)' {{file}}"
    refused(tmp_path, slow, "nothing came for 0.4 seconds", timeout_seconds=0.4, attempts=1)


@pytest.mark.parametrize("name", ["../../etc/passwd", "-rf", "a/../b", "$(touch x).tar", "a b.tar"])
def test_names_in_a_foreign_manifest_stay_in_the_folder(make_data, tmp_path, name):
    local = make_data([100])
    evil = dataclasses.replace(local, tokenizer_file=name)
    write_atomic(local.folder / FILE_NAME, evil.to_json().encode())
    refused(tmp_path, f"pipe:cat {local.folder}/{{file}}", r"manifest.json\) is damaged: tokenizer.file = ")


def test_a_full_disk_makes_room_first_and_then_says_so(make_data, serve, tmp_path, monkeypatch):
    local = make_data(SHARDS)
    server = serve(local.folder)
    manifest = load_manifest(server.url, options=options(tmp_path))
    first, second = manifest.split("train").shards[0], manifest.split("train").shards[2]
    read_shard(manifest, first)
    attempt = module.RemoteFolder._attempt

    def full(self, file, partial):
        if any(entry.is_file() and not entry.name.endswith(".partial") for entry in os.scandir(partial.parent)):
            raise OSError(errno.ENOSPC, "No space left on device")
        attempt(self, file, partial)

    monkeypatch.setattr(module.RemoteFolder, "_attempt", full)
    assert len(read_shard(manifest, second)) == second.tokens  # the other one has gone

    def always(self, file, partial):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.RemoteFolder, "_attempt", always)
    with pytest.raises(UserError, match=r"no space left for .*data\.remote\.cache"):
        read_shard(manifest, first)


def test_a_file_that_is_open_may_be_removed(tmp_path):
    cache = ShardCache(tmp_path, limit=10)
    one, two = "aa" * 32, "bb" * 32
    with cache.open(one, lambda path: path.write_bytes(b"12345678")) as first:
        cache.open(two, lambda path: path.write_bytes(b"abcdefgh")).close()
        assert not (tmp_path / one).exists() and (tmp_path / two).exists()
        assert first.read() == b"12345678"


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../" * 9 + "x", "A" * 64, "a" * 63, "a" * 64 + "\n", "a" * 63 + "/"]
)
def test_a_key_of_the_cache_is_a_sha256(tmp_path, key):
    cache = ShardCache(tmp_path / "cache", limit=10)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="SHA-256"):
        cache.open(key, lambda path: pytest.fail("fetched"))
    with open(__file__, "rb") as file, pytest.raises(UserError, match="SHA-256"):
        cache.discard(key, file)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_configuration_reaches_the_folder(make_data, serve, tmp_path):
    from megatron_bit.data.corpus import open_corpus

    server = serve(make_data(SHARDS).folder)
    overrides = [f"data.path={server.url}", f"data.remote.cache={tmp_path / 'here'}", "data.remote.attempts=3"]
    corpus = open_corpus(load_config(preset="laptop", overrides=overrides).data, 4, check=True)
    assert corpus.manifest.remote.options.attempts == 3
    assert (tmp_path / "here" / "files").is_dir() and corpus.manifest.name == server.url
