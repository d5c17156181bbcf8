"""Operations of a rank by itself: matrix products, work that is deferred, clocks."""
