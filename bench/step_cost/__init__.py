"""What a step of the time loop costs, read from the compiled kernel: no GPU is needed.

    python -m bench.step_cost --cell lstm --dtype fp16 --hidden 768 --batch 16
    make step-cost ARGS="--cell gru --dtype bf16 --hidden 512 --batch 64 --every-plan"

A step takes microseconds, and most of what can go wrong with one shows in the machine code: bank
conflicts in shared memory, loads that wait for one another, values fetched ahead and then waited
for. Those are facts. Times are predictions of a model whose figures, with their ranges and
sources, are in `parameters`; believe their ratios more than their microseconds.

    ptx          addresses in shared memory, and so bank conflicts, from the PTX
    sass         the time loop of the machine code: order, waits, counts
    flow         loops and paths, for both
    simulate     the clock model: warps of one program on one multiprocessor
    parameters   what the model assumes, or what bench/limits.py has measured
    read         one compiled kernel -> a `Reading` of all of it
    gate         what no kernel may show (bench/aot.py, make aot)
"""
