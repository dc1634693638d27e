"""The sums and the rules of the two SGLang scripts; the commands themselves run the engine."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import warm
from book import CHAPTERS

FOLDER = f"{CHAPTERS[6]}/code"
CHECKPOINT = warm.ROOT / CHAPTERS[7] / "checkpoint"
OFFLINE = f"{FOLDER}/sglang_offline.py"
SERVER = f"{FOLDER}/sglang_server.py"
Run = Callable[..., warm.Result]


@pytest.fixture(scope="module")
def offline() -> ModuleType:
    return warm.load("sglang_offline", warm.ROOT / OFFLINE)


@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (40, 0), (40, 39), (40, 25)])
def test_flops_of_a_prefill(offline: ModuleType, tokens: int, cached: int) -> None:
    """PyTorch counts the same, and the half of the scores that a mask throws away."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, attn_implementation="eager")
    prompt = torch.arange(tokens)[None] + 300
    with torch.no_grad():
        before = model(prompt[:, :cached], use_cache=True).past_key_values if cached else None
        with FlopCounterMode(display=False) as counter:
            model(prompt[:, cached:], past_key_values=before, logits_to_keep=1)
    config = model.config
    new = tokens - cached
    masked = new * tokens - (tokens * (tokens + 1) - cached * (cached + 1)) // 2
    masked_flops = config.num_hidden_layers * 4 * config.hidden_size * masked
    rotary = config.head_dim * new  # the angles are a product of matrices, too
    counted = counter.get_total_flops() - masked_flops
    assert counted - offline.prefill_flops(config, tokens, cached) in (0, rotary)


@pytest.mark.parametrize(
    ("prompt", "kept", "page", "hit"),
    [
        ([1, 2, 3, 4], [], 1, 0),
        ([1, 2, 3, 4], [[1, 2, 3, 4]], 1, 3),  # the last token is computed in any case
        ([1, 2, 3, 4], [[1, 2, 9], [1]], 1, 2),
        ([1, 2, 3, 4, 5], [[1, 2, 3, 4, 5]], 4, 4),
        ([1, 2, 3, 4], [[1, 2, 3, 4]], 4, 0),
    ],
)
def test_expected_hit(
    offline: ModuleType, prompt: list[int], kept: list[list[int]], page: int, hit: int
) -> None:
    assert offline.expected_hit(prompt, kept, page) == hit


def test_verdicts_on_json(offline: ModuleType) -> None:
    assert offline.verdict('{"a": 1}', "stop") == "parsed"
    assert offline.verdict('{"a":\n\n\n', "length") == "cut off"
    assert offline.verdict('{"a": "x\x02"}', "stop") == "with a control character"
    assert offline.verdict('{"a": 1', "stop") == "other"


def test_the_regex_is_the_schema_without_whitespace(offline: ModuleType) -> None:
    import json
    import re

    for ranks in (0, 1, 9, 10, 59, 60, 64, 65, 100):
        for note in ("", "all of them", "Longer than twelve", "a\x02"):
            answer = {"collective": "all_reduce", "ranks": ranks, "note": note}
            text = json.dumps(answer, separators=(",", ":"))
            valid = 1 <= ranks <= 64 and re.fullmatch("[a-z ]{0,12}", note)
            assert bool(re.fullmatch(offline.REGEX, text)) == bool(valid), text


@pytest.mark.parametrize("script", [OFFLINE, SERVER])
def test_without_the_environment(script: str, tmp_path: Path) -> None:
    result = warm.run(f"python {warm.ROOT / script}", tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip() == "needs SGLang: make sglang"


# --- the full tier -------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("script", [OFFLINE, SERVER])
def test_a_model_that_is_not_there(run: Run, script: str, sglang: Path) -> None:
    result = run(f"python {script} --model runs/none")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert "--model runs/none: " in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.full
def test_pages_of_sixteen_tokens(run: Run, sglang: Path) -> None:
    result = run(f"python {OFFLINE} --page-size 16 --answers 4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "check: requests with other cached tokens than predicted = 0 <= 0  ok" in result.stdout


def fake_server(folder: Path, script: str) -> None:
    """A program in place of `sglang`, for what the script does when a server goes wrong."""
    program = folder / ".venv-sglang/bin/sglang"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.full
def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    fake_server(tmp_path, "echo 'no memory left'; exit 3")
    result = warm.run(f"python {warm.ROOT / SERVER} --model {CHECKPOINT}", tmp_path)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert "the server ended with 3 before it was ready" in result.stderr
    assert "no memory left" in result.stderr


@pytest.mark.full
def test_a_script_that_is_ended_ends_its_server(tmp_path: Path) -> None:
    fake_server(tmp_path, "echo $$ > started; exec sleep 600")
    command = [sys.executable, str(warm.ROOT / SERVER), "--model", str(CHECKPOINT)]
    script = subprocess.Popen(command, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        script.terminate()
        assert script.wait(30) == 143
        assert not [line for line in warm.orphans(tmp_path) if "sleep" in line]
    finally:
        script.kill()
