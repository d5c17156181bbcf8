"""Pipeline parallelism: a plan is data (`schedule`, `partition`), proved (`validate`), drawn (`timeline`), then run."""
