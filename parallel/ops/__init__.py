"""Operations without communication: matrix products, deferred calls, clocks, and a mark for torch.compile."""
