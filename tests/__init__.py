"""The tests, a package so that the processes `harness.run` starts can import a test module by its name."""
