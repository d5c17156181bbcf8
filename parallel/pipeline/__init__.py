"""Pipeline parallelism: a plan is data (`schedule`), proved (`validate`), drawn (`timeline`) and executed (`runner`).

The counterpart is torch.distributed.pipelining.
"""
