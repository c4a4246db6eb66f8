"""What the fork server of gloo_ranks imports before it forks ranks."""

import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402

import megatron_bit.inference.convert  # noqa: E402
import megatron_bit.inference.generate  # noqa: E402
import megatron_bit.training.job  # noqa: E402, F401
from megatron_bit.optim import zero  # noqa: E402
from megatron_bit.parallel import mcore  # noqa: E402

zero._import_deepspeed()
mcore.prepare()

import megatron.core.models.common.embeddings.rotary_pos_embedding  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402
import megatron.core.transformer.transformer_block  # noqa: E402, F401
import tensorboard  # noqa: E402, F401
import webdataset  # noqa: E402, F401

torch.set_num_threads(1)
