"""Steps of models of Llama's structure by a kernel in C, compiled where it runs.

    runner.py    chunks in, logits out; where the adapters' stacks lie     step.c      the step: layers, head, threads
    weights.py   which models; matrices packed once                        job.h       a step's memory; sharing the work
    build.py     the compiler, and the library that it made                layer.h     what is done run by run of rows
                                                                           product.h   packed matrices, products
                                                                           rows.h      norm, rotation, attention
"""
