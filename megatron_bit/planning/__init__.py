"""`megatron-bit plan`: which layout is fastest on which cluster, worked out without torch.

parameters -> memory -> operations -> times -> search -> table.
"""
