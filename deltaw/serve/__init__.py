"""One base, many adapters, one server: the engine, its scheduler and pool of adapters, and the HTTP interface.

    service   what a front end calls: names, prompts, submit, load and unload       (`service`, `prompts`, `text`)
    engine    one thread that runs step after step                                 (`engine`)
      scheduler   who runs next, and in which place of the cache; plain Python       (`scheduler`, `places`, `request`)
      pool        which adapters there are, which are in memory                      (`pool`, `fit`)
      runner      one forward over the tokens of a step                              (`runner`, `cache`, `banks`)
        native      ... by a kernel in C, for models of Llama's structure on a CPU     (`native/`)
      sampling    from logits to tokens                                              (`sampling`)
    http      OpenAI's interface; knows the service alone                           (`http/`)
"""
