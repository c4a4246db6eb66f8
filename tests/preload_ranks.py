"""What the fork server of gloo_ranks imports before it forks ranks: whatever a rank would import itself."""

import gc
import warnings

warnings.simplefilter("ignore")

import torch

import megatron_bit.inference.convert
import megatron_bit.inference.generate
import megatron_bit.optim.replicated
import megatron_bit.training.job
from megatron_bit.optim import zero
from megatron_bit.parallel import mcore

zero._import_deepspeed()
mcore.prepare()

import deepspeed.comm.mori
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.original_muon
import megatron.core.fusions.fused_bias_dropout
import megatron.core.fusions.fused_softmax
import megatron.core.models.backends
import megatron.core.models.common.embeddings.rotary_pos_embedding
import megatron.core.pipeline_parallel
import megatron.core.transformer.attention
import megatron.core.transformer.dot_product_attention
import megatron.core.transformer.multi_token_prediction
import megatron.core.transformer.transformer_block
import numpy.ma
import tensorboard
import torch._subclasses.schema_check_mode
import torch.profiler._cupti_monitor
import webdataset

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # a collection in a rank leaves alone what it shares with the server: half of a short rank's time
