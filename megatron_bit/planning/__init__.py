"""`megatron-bit plan`: which layout is fastest on which cluster, worked out without torch.

parameters and dry run: `megatron_bit.plan`; memory -> operations -> times -> search -> table.
"""
