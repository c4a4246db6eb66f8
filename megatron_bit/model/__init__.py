"""The model. Letters of shapes, the same in model/, diffusion/ and kernels/mbit_kernels:

s   tokens of a sequence that this rank's activations hold (a part of S under sequence parallelism)
S   tokens of the whole sequence            n   blocks of it, s / K
b   samples of a micro-batch                K   tokens of a block (`model.block_size`)
V   tokens of the vocabulary                B   bits of a token (`model.bits`)
G   groups of a token's bits                U   values of a group, 2^P     P   bits of the largest group
Q   noisy blocks of a sequence              q   those of them in this rank's part
M   noise samples, or evaluations of the head for one state                R   rows of the head, b * M
T   tables of a memory, orders x hashes: rows that are looked up for a token
D   width of the backbone                   W   width of the head          d   width of an attention head
"""
