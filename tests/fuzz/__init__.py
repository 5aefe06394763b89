"""A fuzzer for what people download and type: adapter folders, configs, YAML, data, command lines, interrupted writes.

    python -m tests.fuzz --cases 20000 --seed 1       # `make fuzz CASES=20000`
    python -m tests.fuzz --case 1:4711                # one case again, with its folder kept
    python -m tests.fuzz --self-check                 # and see that the cases find broken versions of the package

A case is a seed and an index: the index says which kind it is, both together every choice it makes. `campaign` runs
cases in worker processes, so that a crash, a hang or a greedy allocation is a finding too.
"""
