"""Steps of models of Llama's structure by a kernel in C, compiled where it runs: `native_runner`."""
