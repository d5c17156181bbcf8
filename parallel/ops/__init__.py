"""Operations without communication: matrix products, deferred calls, clocks, kernels, and marks for torch.compile."""
