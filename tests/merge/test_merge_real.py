"""`merge_files` on the real model: beside PEFT's own merge, and within the memory of one tensor."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import deltaw
from deltaw.core import SiteDelta
from deltaw.merge import merge_files

pytestmark = pytest.mark.slow


def test_the_real_model_merges_as_peft_does(smollm2: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    board = deltaw.attach(model, deltaw.LoraConfig(r=8, init_lora_weights=False, task_type="CAUSAL_LM"), seed=1)
    board.adapter("default").save(tmp_path / "adapter")
    report = merge_files(smollm2, tmp_path / "adapter", tmp_path / "out")
    assert report.base_check == "weights"
    assert not report.untied
    assert report.seconds < 60
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("The capital of France is", return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        got = merged(ids).logits
        torch.testing.assert_close(got, model(ids).logits, rtol=1e-3, atol=1e-3)
        board.merge()
        assert torch.equal(got, model(ids).logits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
            theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32),
                                               tmp_path / "adapter").merge_and_unload()
        torch.testing.assert_close(got, theirs.eval()(ids).logits, rtol=1e-3, atol=1e-3)


def test_what_peft_trained_on_experts_merges_as_it_runs_there(tmp_path: Path) -> None:
    """Two adapted parameters of one module, whose order PEFT's files do not tell; stored one expert at a time."""
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2)).eval()
    model.save_pretrained(tmp_path / "base")
    ids = torch.arange(3, 15).reshape(2, 6)
    before = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj"],
                                                target_parameters=["experts.down_proj", "experts.gate_up_proj"]))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
        wanted = peft.eval()(ids).logits
    peft.save_pretrained(tmp_path / "adapter")
    assert merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").base_check == "not recorded"
    with torch.no_grad():
        got = MixtralForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, before, atol=1e-3)


_MEASURED = """
import sys
from pathlib import Path
from deltaw import store
from deltaw.merge import folder
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
folder.build_skeleton(Path(sys.argv[1]), store.load(sys.argv[2]))  # what is imported is not what merging needs
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which is also the parent's
before = peak()
folder.merge_files(sys.argv[1], sys.argv[2], sys.argv[3], any_base=True)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak of memory is told by Linux only")
def test_memory_is_that_of_one_tensor_and_not_of_the_model(tmp_path: Path, repo: Path) -> None:
    """300 MB of weights in one file, in tensors of 12 MB: the merge may hold a few times one tensor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=1024, intermediate_size=6144, num_hidden_layers=8,
                         num_attention_heads=8, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    (tmp_path / "base").mkdir()
    config.save_pretrained(tmp_path / "base")
    weights = {name: torch.full(p.shape, 0.01, dtype=p.dtype) for name, p in model.named_parameters()}
    size, largest = (f(t.numel() * 2 for t in weights.values()) / 2**20 for f in (sum, max))
    assert size > 300
    assert largest < 13
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    board = deltaw.attach(model, deltaw.LoraConfig(r=2))
    sites = {}
    for target in board.table("default"):
        shapes = zip(("lora_A", "lora_B"), target.site.geometry.factor_shapes(2), strict=True)
        sites[target.site.name] = SiteDelta(target.site.geometry, {key: torch.full(s, 0.01) for key, s in shapes})
    adapter = deltaw.Adapter(deltaw.LoraConfig(r=2), sites)
    adapter.save(tmp_path / "adapter")
    command = [sys.executable, "-c", _MEASURED, *(str(tmp_path / n) for n in ("base", "adapter", "out"))]
    run = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    grown = int(run.stdout.split()[-1]) / 1024
    print(f"memory grew by {grown:.0f} MiB for {size:.0f} MiB of weights, the largest tensor {largest:.0f} MiB")
    assert largest < grown < 10 * largest < size / 2
