"""Folders, globs, links, pipes: nothing that is there is left out in silence, and nothing comes twice."""

import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data.inputs import expand_inputs
from mbit_data.left_out import LeftOut
from mbit_data.prepare import PrepareOptions, prepare
from mbit_data.read import Reading, read_documents, scan

from megatron_bit.errors import UserError

NAMES = ["a", "b", "c.txt", ".hidden"]


def sources(*inputs, **more):
    return [file.source for file in expand_inputs([str(i) for i in inputs], **more)]


@pytest.fixture
def no_override(monkeypatch):
    """root reads everything: let these names be refused as the kernel would for others."""
    closed = set()
    for module, name in ((os, "scandir"), (os, "listdir")):
        real = getattr(module, name)

        def guarded(path=".", real=real):
            if os.path.realpath(path) in closed:
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return real(path)

        monkeypatch.setattr(module, name, guarded)
    return closed


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(NAMES), max_size=3), st.sampled_from(["file", "up", "link", "dangling"])),
        max_size=12,
    )
)
@settings(max_examples=100, deadline=None)
def test_a_folder_and_its_globs_give_the_same_files_once(tmp_path_factory, entries):
    """Trees with links to folders above, beside and outside, and to nothing."""
    base = tmp_path_factory.mktemp("tree")
    root, outside = base / "root", base / "outside"
    for folder in (root, outside / "in"):
        folder.mkdir(parents=True)
        (folder / "always.txt").write_text(str(folder))
    for number, (parts, kind) in enumerate(entries):
        folder = root.joinpath(*parts)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, OSError):
            continue
        target = {"up": folder.parent, "link": outside, "dangling": base / "nowhere"}.get(kind)
        path = folder / f"{number}-{kind}"
        if target is None:
            path.write_text(str(number))
        else:
            path.symlink_to(target)
    left_out, of_glob = LeftOut(), LeftOut()
    files = expand_inputs([str(root)], left_out=left_out)
    assert files == expand_inputs([f"{root}/**"], left_out=of_glob)
    assert left_out.counts == of_glob.counts
    assert {f.path.resolve() for f in files} == {f.path.resolve() for f in expand_inputs([f"{root}/**/*"])}
    real = [file.path.resolve() for file in files]
    assert len(real) == len(set(real))

    def reachable(folder, seen):
        if folder.resolve() in seen:
            return
        seen.add(folder.resolve())
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield from reachable(path, seen)
            elif path.is_file():
                yield path.resolve()

    assert set(real) == set(reachable(root, set()))


def test_a_linked_folder_has_its_own_name_where_it_has_one(tmp_path):
    for folder in ("root/z", "other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.txt").write_text("x")
    (tmp_path / "root" / "a").symlink_to("z")
    (tmp_path / "root" / "b").symlink_to("../other")
    (tmp_path / "root" / "loop").symlink_to(".")
    assert sources(tmp_path / "root") == ["b/x.txt", "z/x.txt"]
    assert sources(tmp_path / "root", tmp_path / "other") == ["b/x.txt", "z/x.txt"]


def test_what_is_no_file_is_counted_and_named(tmp_path):
    (tmp_path / "good.txt").write_text("x")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        left_out = LeftOut()
        assert sources(tmp_path, left_out=left_out) == ["good.txt"]
    assert left_out.counts == {"dangling link": 2, "special file": 2}
    assert f"left out: 2 dangling links ({tmp_path}/dangling.txt, {tmp_path}/self)" in left_out.lines()
    left_out = LeftOut()
    assert sources(tmp_path / "*.txt", left_out=left_out) == ["good.txt"] and left_out.counts == {"dangling link": 1}
    for name, message in (("dangling.txt", "is a link to 'nowhere'"), ("socket", "is a device or a socket")):
        with pytest.raises(UserError, match=message):
            sources(tmp_path / name)
    with pytest.raises(UserError, match="is a device or a socket"):
        sources("/dev/null")


@pytest.mark.parametrize("form", ["{}", "{}/**", "{}/*/*.txt", "{}/**/*.txt", "{}/locked/*", "{}/*/deep/x.txt"])
def test_an_unreadable_folder_is_an_error_or_counted(tmp_path, no_override, form):
    for folder in ("locked/deep", "open/deep"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "x.txt").write_text("x")
        (tmp_path / "in" / folder / ".." / "y.txt").write_text(folder)
    no_override |= {str(tmp_path / "in" / "locked")}
    text = form.format(tmp_path / "in")
    if form.endswith("deep/x.txt"):  # no need to list it: the kernel lets one through a folder that has x alone
        return
    with pytest.raises(UserError, match=r"input folder .*/locked cannot be read: Permission denied; .*--on-error skip"):
        sources(text)
    left_out = LeftOut("skip")
    if "locked" in form:
        with pytest.raises(UserError, match=r"no files in it.*1 unreadable folder \(.*locked\)"):
            sources(text, left_out=left_out)
    else:
        assert sources(text, left_out=left_out)
    assert left_out.counts == {"unreadable folder": 1}


def test_an_unreadable_file_is_an_error_or_counted(tmp_path, monkeypatch):
    import builtins

    real = builtins.open

    def guarded(path, *args, **kwargs):
        if str(path).endswith("locked.txt"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **kwargs)

    for name in ("locked.txt", "open.txt"):
        (tmp_path / name).write_text("text")
    monkeypatch.setattr(builtins, "open", guarded)
    for on_error, inputs in (("stop", tmp_path), ("skip", tmp_path / "locked.txt")):
        with pytest.raises(UserError, match=r"locked\.txt cannot be read: Permission denied"):
            scan(expand_inputs([str(inputs)]), 1, Reading(), LeftOut(on_error))
    left_out = LeftOut("skip")
    assert [file.source for file in scan(expand_inputs([str(tmp_path)]), 1, Reading(), left_out)] == ["open.txt"]
    assert left_out.counts == {"unreadable file": 1}


def test_what_was_left_out_stands_in_the_manifest(prepared, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    (folder / "b.bin").write_bytes(b"\0\1")
    (folder / "c.txt").symlink_to("nowhere")
    (folder / "d.txt").write_text("wide", encoding="utf-16")
    given = prepared.tokenizer_path
    options = {"validation_fraction": 0.0, "workers": 1}
    with pytest.raises(UserError, match=r"d\.txt is UTF-16 or UTF-32; make it UTF-8: iconv"):
        prepare(PrepareOptions((str(folder),), tmp_path / "out", given, **options), progress=False)
    with pytest.raises(UserError, match=r"d\.txt is UTF-16"):
        prepare(PrepareOptions((str(folder / "d.txt"),), tmp_path / "out", given, on_error="skip"), progress=False)
    manifest = prepare(PrepareOptions((str(folder),), tmp_path / "out", given, on_error="skip", **options))
    assert manifest.dropped == {"binary file": 1, "dangling link": 1, "UTF-16 file": 1}
    said = capsys.readouterr().err
    for path in ("b.bin", "c.txt", "d.txt"):
        assert f"({folder / path})" in said


def texts_of_pipe(path: Path, data: bytes, spool: Path) -> list[tuple[str, list[str]]]:
    thread = threading.Thread(target=lambda: path.write_bytes(data))
    thread.start()
    files = scan(expand_inputs([str(path)], exclude=spool, spool=spool), 1)
    thread.join()
    twice = [[document.text for document in read_documents(file)] for file in files for _ in range(2)]
    assert twice[0] == twice[1] and list(spool.iterdir()) == []
    return [(files[0].source, twice[0])]


def test_a_pipe_is_read_once_and_has_its_format(tmp_path):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    lines = b'{"text": "one"}\n{"text": "two"}\n'
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    fifo = tmp_path / "a.jsonl"
    os.mkfifo(fifo)
    assert texts_of_pipe(fifo, lines, tmp_path / "out") == [("a.jsonl", ["one", "two"])]
    for data, source, texts in (
        (lines, "pipe-0.jsonl", ["one", "two"]),
        (gzip.compress(lines), "pipe-0.jsonl.gz", ["one", "two"]),
        (zstandard.compress(lines), "pipe-0.jsonl.zst", ["one", "two"]),
        ((tmp_path / "a.parquet").read_bytes(), "pipe-0.parquet", ["one", "two"]),
        (b"plain text\n", "pipe-0.txt", ["plain text\n"]),
        (b'"a JSON string" is text\n', "pipe-0.txt", ['"a JSON string" is text\n']),
        (b"", "pipe-0.txt", [""]),
    ):
        read, write = os.pipe()
        os.write(write, data)
        os.close(write)
        files = scan(expand_inputs([f"/dev/fd/{read}"]), 1)
        os.close(read)
        assert [file.source for file in files] == [source]
        for _ in range(2):
            assert [document.text for document in read_documents(files[0])] == texts
    with open(tmp_path / "named.jsonl", "w+b") as file:
        file.write(lines)
        file.flush()
        assert sources(f"/dev/fd/{file.fileno()}") == ["named.jsonl"]


def test_paths_are_expanded_unless_they_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WHERE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.txt").write_text("x")
    for text in ("~", "~/a.txt", "~/*.txt", "$WHERE", "${WHERE}/a.*"):
        assert sources(text) == ["a.txt"]
    Path("$WHERE.txt").write_text("mine")
    assert sources("$WHERE.txt") == ["$WHERE.txt"]
    with pytest.raises(UserError, match="the variable NOT_THERE is not set"):
        sources("$NOT_THERE/a.txt")
