"""What fits, what binds, what would make it fit; devices; time; sources of shapes; the page of published figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltaw.core import LoraConfig, stretches
from deltaw.errors import BaseModelError, ConfigError
from deltaw.plan import Plan, PlanConfig, plan
from deltaw.plan.calibrate import Rates, calibrate, known_rates
from deltaw.plan.config import parse_memory
from deltaw.plan.devices import DEVICES, available_memory, find_device
from deltaw.plan.fit import last
from deltaw.plan.memory import STRIP, Sizes, base_weights, training
from deltaw.plan.published import page
from deltaw.plan.table import lines
from deltaw.plan.tape import Work
from deltaw.plan.timing import between, evaluation_work, seconds_here, unpacking_seconds

SMALL = PlanConfig(model="smollm2-135m", device="rtx3060", batch_size=2, max_length=64, methods=("lora",))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_HOME", str(tmp_path_factory.mktemp("plans")))
        yield plan(SMALL)


def test_what_is_said_to_fit_fits_and_one_more_does_not(small: Plan) -> None:
    most = small["lora"].largest
    assert most["batch_size"] > 2
    assert small["lora"].fits
    for name in ("batch_size", "max_length"):
        at = plan(replace(SMALL, **{name: most[name]}), search=False)["lora"]
        above = plan(replace(SMALL, **{name: round(1.1 * most[name]) + 1}), search=False)["lora"]
        assert at.peak <= 1.03 * small.device.memory
        assert above.peak > small.device.memory


def test_the_change_that_is_named_makes_it_fit(small: Plan) -> None:
    limit = f"{1.001 * small['lora'].peak / 1e6:.0f}MB"  # what is worked out from batches of 64 is that near
    large = replace(SMALL, memory=limit, batch_size=64)
    found = plan(large)["lora"]
    assert found.fits is False
    assert found.binds.startswith("activations")
    batch = int(found.change.split()[1])
    assert plan(replace(large, batch_size=batch), search=False)["lora"].fits


def test_a_base_that_is_too_large_is_told_what_the_least_is() -> None:
    found = plan(replace(SMALL, memory="200MB", methods=("lora", "full")))
    for method in found.methods:
        assert method.fits is False
        assert "at the least it needs" in method.change
    assert found["lora"].largest["batch_size"] == 0


def test_parts_follow_from_shapes() -> None:
    found = plan(replace(SMALL, methods=("full", "lora", "qlora")), search=False)
    values = 134_515_008
    for name, trained, width in (("full", values, 2), ("lora", 2_442_240, 4)):
        parts = found[name].memory["train"].parts
        assert found[name].parameters == trained
        assert parts["optimizer"] == 2 * width * trained
        assert parts["weights"] == pytest.approx(2 * values, rel=1e-3)
        assert found[name].adapter_bytes == width * trained
    linear = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert found["qlora"].memory["load"].parts["weights"] == pytest.approx(
        2 * (values - linear) + linear * 4.127 / 8, rel=1e-3)
    assert found["qlora"].peak < found["lora"].peak < found["full"].peak


def test_checkpointing_keeps_less_and_computes_more() -> None:
    rates = Rates(narrow_output={1: 1e9}, narrow_inner={1: 1e9}, attention=1e9, bytes={1: 1e9}, start=1e-6)
    kept, work = {}, {}
    for mode in ("off", "attention", "layer"):
        from deltaw.plan.shapes import read_shapes
        from deltaw.plan.step import Steps

        config = replace(SMALL, gradient_checkpointing=mode)  # type: ignore[arg-type]
        step = Steps(read_shapes("smollm2-135m"), config, torch.float32).at("lora", 2, 64)
        kept[mode], work[mode] = step.kept, seconds_here(step.work, rates)
    assert kept["layer"] < 0.2 * kept["off"] < kept["attention"] < kept["off"]
    assert work["off"] < work["attention"] < work["layer"] < 1.6 * work["off"]


def test_a_lower_share_of_supervised_tokens_has_fewer_logits() -> None:
    parts = [plan(replace(SMALL, supervised=share), search=False)["lora"].memory["train"].parts["logits"]
             for share in (1.0, 0.25)]
    assert parts[0] == 128 * 49152 * (2 + 4) + 128 * 576 * 2  # of a GPU, which takes all logarithms at once
    assert parts[1] == parts[0] / 4


def test_devices_by_name_and_near_names() -> None:
    assert find_device("A100").memory == 80 * 2**30
    assert find_device("RTX 4090").name == "rtx4090"
    assert find_device("cpu").memory == pytest.approx(available_memory(), rel=0.2)
    assert find_device("t4", 10**9).memory == 10**9
    assert "bf16" not in (DEVICES["t4"].tflops or {})
    for name, meant in (("rtx490", "rtx4090"), ("h10", "h100")):
        with pytest.raises(ConfigError, match=rf"one of auto.*Did you mean {meant}"):
            find_device(name)


@pytest.mark.parametrize("text", ["", "14 potatoes", "-1GB", "nanGB", "GB"])
def test_a_size_of_memory_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="14GB"):
        parse_memory(text)


def test_all_faults_of_a_config_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        PlanConfig(model="", batch_size=0, methods=("lorra",), dtype="fp8")  # type: ignore[arg-type]
    assert len(caught.value.faults) == 4
    with pytest.raises(ConfigError, match="Did you mean batch_size"):
        PlanConfig.from_dict({"model": "x", "batchsize": 1})


def test_rates_are_measured_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deltaw.plan.calibrate as module

    monkeypatch.setenv("DELTAW_HOME", str(tmp_path))
    monkeypatch.setattr(module, "seconds", lambda run: (run(), 1e-3)[1])
    monkeypatch.setattr(module, "SIZES", (1 << 10,))
    assert known_rates(torch.float32, 1) is None
    assert calibrate(torch.float32, 1) == known_rates(torch.float32, 1)
    assert known_rates(torch.float32, 2) is None
    (next(tmp_path.rglob("rates.json"))).write_text("{")
    assert known_rates(torch.float32, 1) is None


def test_a_round_in_which_the_machine_was_busy_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import deltaw.plan.calibrate as module

    def figures(speed: float) -> dict[str, Any]:
        return {"narrow_output": {8: 4 * speed, 64: 9.0}, "narrow_inner": {8: speed}, "attention": speed,
                "bytes": {4096: speed}, "unpack": speed, "start": 1 / speed}

    rounds = iter([figures(1.0), figures(5.0)])
    monkeypatch.setattr(module, "_round", lambda dtype: next(rounds))
    found = calibrate(torch.float32, 1)
    assert (found.narrow_output, found.start, found.unpack) == ({8: 20.0, 64: 9.0}, 0.2, 5.0)



def test_time_is_work_by_rate() -> None:
    rates = Rates(narrow_output={8: 1e9, 512: 16e9}, narrow_inner={8: 1e9, 512: 16e9}, attention=2e9,
                  bytes={1: 1e9, 1 << 20: 1e9}, start=0.0)
    work = Work(attention=4e9, moved=3e9, calls=10)
    work.products[1, 1000, 512, 1000] = 2
    operands = 4 * (1000 * 1000 + 2 * 1000 * 512) / 1e9
    assert seconds_here(work, rates) == pytest.approx(4 / 2 + 3 + 2 * (2 * 1000 * 512 * 1000 / 16e9 + operands))
    assert between({8: 1.0, 512: 8.0}, 64) == pytest.approx(8**0.5)
    assert last(lambda n: n <= 37, 1000) == 37
    assert last(lambda n: False, 1000) == 0


SIZES = Sizes(weights=100 << 20, matrices=20 << 20, largest=8 << 20, largest_tensor=8 << 20, vocabulary=1000, width=64,
              trained=1000, trained_width=4, inside=False)


def test_a_processor_unpacks_strips_and_a_gpu_whole_layers() -> None:
    config = replace(SMALL, quantize="nf4")
    assert STRIP == stretches.STRIP
    assert base_weights(SIZES, config, "qlora", 4, gpu=False)[1] == 4 * STRIP
    base, buffer = base_weights(SIZES, config, "qlora", 2, gpu=True)
    assert buffer == 2 * (8 << 20)
    assert base == pytest.approx((100 << 20) - 2 * (20 << 20) + (20 << 20) * 4.127 / 8)
    assert base_weights(SIZES, config, "lora", 2, gpu=True) == (100 << 20, 0.0)


def test_unpacking_takes_time_in_every_pass_over_the_base() -> None:
    here = Rates(narrow_output={1: 1e9}, narrow_inner={1: 1e9}, attention=1e9, bytes={1: 1e9}, start=0.0, unpack=1e6)
    kept, again = SMALL, replace(SMALL, gradient_checkpointing="layer")
    packed = (20 << 20) / 2
    assert unpacking_seconds(SIZES, packed, kept, 4, DEVICES["h100"], here) == pytest.approx(2 * (20 << 20) / 1e6)
    assert unpacking_seconds(SIZES, packed, again, 4, DEVICES["h100"], here) == pytest.approx(3 * (20 << 20) / 1e6)
    elsewhere = unpacking_seconds(SIZES, packed, kept, 2, DEVICES["h100"], None)
    assert elsewhere == pytest.approx(2 * 2.5 * (20 << 20) / (3350e9 * 0.75))


def test_under_checkpointing_freed_memory_is_not_counted_beside_logits() -> None:
    def total(mode: str) -> int:
        config = replace(SMALL, gradient_checkpointing=mode, batch_size=8)  # type: ignore[arg-type]
        return training(SIZES, config, "lora", 4, 0.0, kept=1e8, over=1e8, batch=8, length=512, gpu=False).total

    assert total("layer") < total("off") - 3e6


def test_memory_that_is_given_back_is_counted_on_a_processor_alone() -> None:
    def parts(gpu: bool, **options: Any) -> dict[str, float]:
        config = replace(SMALL, **options)
        return dict(training(SIZES, config, "lora", 4, 0.0, kept=1e8, over=1e8, batch=8, length=512, gpu=gpu).parts)

    kept, released = parts(False), parts(False, release_memory=True)
    grown = kept["activations"] + kept["gradients"]
    assert kept["allocator"] - released["allocator"] == pytest.approx((0.19 - 0.15) * grown, rel=1e-4)
    assert {**kept, "allocator": 0} == {**released, "allocator": 0}
    for gpu, options in ((True, {}), (False, {"gradient_checkpointing": "layer"})):  # given back anyway
        assert parts(gpu, **options) == parts(gpu, release_memory=True, **options)


def test_every_adapters_update_takes_time_and_a_lighter_batch_takes_less(small: Plan) -> None:
    def seconds(**options: Any) -> float:
        found = plan(replace(SMALL, **options), search=False)["lora"].step_seconds
        assert found is not None
        return found

    one, update = small["lora"].step_seconds, 7 * 4 * 2_442_240 / (360e9 * 0.75)
    assert one is not None
    assert seconds(adapters=9) - one == pytest.approx(8 * update)
    assert seconds(adapters=9, updates=2.5) - one == pytest.approx(1.5 * update)
    assert seconds(mean_tokens=64) - update == pytest.approx((one - update) / 2)
    total = plan(replace(SMALL, max_steps=7), search=False)["lora"].total_seconds
    assert total == pytest.approx(7 * one)


def test_evaluations_take_a_forward_pass_of_what_is_held_out() -> None:
    def found(**options: Any) -> Any:
        return plan(replace(SMALL, max_steps=7, **options), search=False)["lora"]

    none, some = found(), found(eval_rows=4 * SMALL.batch_size, evaluations=3)
    assert none.evaluation_seconds is None
    assert none.total_seconds == pytest.approx(7 * none.step_seconds)
    assert some.step_seconds == none.step_seconds
    assert some.total_seconds == pytest.approx(none.total_seconds + 3 * some.evaluation_seconds)
    assert 0.15 < some.evaluation_seconds / 4 / none.step_seconds < 0.5  # a forward pass of a step's three
    assert found(eval_rows=SMALL.batch_size).evaluation_seconds == pytest.approx(some.evaluation_seconds / 4)
    half = found(eval_rows=4 * SMALL.batch_size, mean_tokens=SMALL.tokens / 2)
    assert half.evaluation_seconds == pytest.approx(some.evaluation_seconds / 2)


def test_an_evaluation_unpacks_a_base_once_for_each_batch_and_draws_nothing() -> None:
    here = Rates(narrow_output={1: 1e12}, narrow_inner={1: 1e12}, attention=1e12, bytes={1: 1e12}, start=0.0,
                 unpack=1e3, drawn=1e3)
    packed = unpacking_seconds(SIZES, 1e6, SMALL, 4, DEVICES["h100"], here, times=1)
    assert packed == pytest.approx((20 << 20) / 1e3)
    work = evaluation_work(Work(drawn=1e6, attention=1e6), SIZES, SMALL, 2, 64)
    assert (work.drawn, work.attention) == (0.0, 1e6)
    assert work.products == {(1, 128, 1000, 64): 1}
    assert evaluation_work(Work(), SIZES, SMALL, 2, 64, kernels=True).frozen == work.products
    assert evaluation_work(Work(), SIZES, replace(SMALL, task="seq-cls"), 2, 64) == Work()


def test_only_a_low_rank_change_is_merged() -> None:
    found = plan(replace(SMALL, methods=("full", "adapter-h", "lora", "qlora")), search=False)
    assert [m.method for m in found.methods if "merge" in m.memory] == ["lora", "qlora"]
    parts = found["lora"].memory["merge"].parts  # SmolLM2's embedding is copied; its layers are smaller
    assert (parts["weights"], parts["adapters"]) == (49152 * 576 * 2, 4 * 2_442_240)


def test_full_fine_tuning_is_told_of_the_smallest_that_fits() -> None:
    least = plan(replace(SMALL, methods=("qlora",), batch_size=1, max_length=512, gradient_checkpointing="layer"),
                 search=False)["qlora"].peak
    found = plan(replace(SMALL, methods=("full",), batch_size=8, max_length=512, memory=f"{1.02 * least / 1e6:.0f}MB"))
    assert found["full"].change == "a base in 4 bits (qlora), batch_size 1 and gradient_checkpointing layer"


def test_no_length_is_promised_that_training_refuses() -> None:
    bert = PlanConfig(model="bert-base", task="seq-cls", device="h100", batch_size=1, max_length=256, methods=("lora",))
    found = plan(bert)
    assert found["lora"].largest["max_length"] == 512
    assert not any("refuses a larger" in note for note in found.notes)
    assert any("takes 512 tokens" in note for note in plan(replace(bert, max_length=1024), search=False).notes)


def test_scales_that_are_not_packed_take_half_a_bit_more() -> None:
    weights = [base_weights(SIZES, replace(SMALL, double_quant=packed), "qlora", 4, gpu=False)[0]
               for packed in (True, False)]
    assert weights[1] - weights[0] == pytest.approx((20 << 20) * (4.5 - 4.127) / 8)
    assert plan(replace(SMALL, methods=("qlora",), quantize="int8", double_quant=True), search=False)["qlora"].fits


def test_a_base_that_is_quantized_already_is_weighed_as_its_files_are(tiny_llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain, packed = tmp_path / "plain", tmp_path / "packed"
    tiny_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=4).save_pretrained(plain)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings).save_pretrained(packed)
    asked = PlanConfig(model=str(plain), methods=("lora", "qlora", "full"), dtype="fp32", max_length=32, device="cpu")
    before, after = plan(asked, search=False), plan(replace(asked, model=str(packed)), search=False)
    for phase in ("train", "load"):
        found = after["lora"].memory[phase]  # type: ignore[index]
        expected = before["qlora"].memory[phase].parts  # type: ignore[index]
        assert found.parts["weights"] == pytest.approx(expected["weights"], rel=0.02)
        assert found.parts["framework"] == expected["framework"]
        assert found.parts == after["qlora"].memory[phase].parts  # type: ignore[index]
    assert after["lora"].memory["load"].parts["file"] == 0  # nothing is packed on the way
    assert after.weights < before.weights / 3
    assert (before["full"].parameters, after["full"].parameters) == (before.parameters, 0)
    assert any("quantized already (bitsandbytes)" in note for note in after.notes)


def test_gpt2s_transposed_layers_are_quantized_too() -> None:
    found = plan(PlanConfig(model="gpt2", device="rtx3060", methods=("lora", "qlora"), max_length=64), search=False)
    linear = 12 * 12 * 768 * 768
    saved = found["lora"].memory["load"].parts["weights"] - found["qlora"].memory["load"].parts["weights"]
    assert saved == pytest.approx(linear * (2 - 4.127 / 8), rel=1e-6)


def test_a_hub_id_is_read_by_its_headers_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                               tiny_llama: Callable[..., Any]) -> None:
    import huggingface_hub

    model = tiny_llama()
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repo: SimpleNamespace(
        parameter_count={"BF16": sum(p.numel() for p in model.parameters())}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda repo, file: asked.append(file) or str(tmp_path / file))
    found = plan(PlanConfig(model="someone/tiny", device="h100", batch_size=1, max_length=8, methods=("lora",)),
                 search=False)
    assert asked == ["config.json"]
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_a_repository_without_headers_and_one_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    def refuse(repo: str) -> None:
        raise NotASafetensorsRepoError("none")

    for name in ("someone/llama-70b", "llama-70b"):
        with pytest.raises(BaseModelError, match=r"Hub.*one of gpt3-175b.*Did you mean llama3-70b, llama2-70b"):
            plan(PlanConfig(model=name, device="h100"))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", refuse)
    with pytest.raises(BaseModelError, match="has no safetensors headers"):
        plan(PlanConfig(model="someone/pickled"))


def test_three_lines() -> None:
    said = lines(plan(replace(SMALL, rows=100, lora=LoraConfig(r=4)), search=False))
    assert len(said) == 3
    assert "1,221,120 trained values" in said[0]
    assert "fits" in said[2]


def test_the_page_of_published_figures_is_what_its_command_writes(repo: Path) -> None:
    assert (repo / "docs" / "published_figures.md").read_text(encoding="utf-8") == page()
