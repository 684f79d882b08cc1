"""Files for other programs: a model or an adapter as llama.cpp's GGUF, and the Modelfile that Ollama builds from."""

from deltaw.convert.adapter import adapter_to_gguf
from deltaw.convert.model import model_to_gguf
from deltaw.convert.modelfile import modelfile
from deltaw.convert.report import ConvertReport

__all__ = ["ConvertReport", "adapter_to_gguf", "model_to_gguf", "modelfile"]
