"""configs/ and launch/: every key is read, each configuration trains to the golden losses, each file starts."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import book
import kubernetes_validate
import pytest
import slurm
import torch
import torch.nn.functional as F
import warm
import yaml
from mutants import failed_claims
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which is for Linux")
FOLDER = Path("chapter5-deepspeed-and-zero-optimization/code")
CODE = warm.ROOT / FOLDER
LAUNCH = CODE / "launch"
SCRIPT = CODE / "train.py"
GOLDEN = "chapter3-distributed-training-with-pytorch-ddp/code/golden.json"
CONFIGS = {
    path.stem: json.loads(path.read_text()) for path in sorted((CODE / "configs").glob("*.json"))
}
debugging = warm.load("chapter5_debugging", CODE / "deepspeed_debugging.py")
full = pytest.mark.full


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(warm.ROOT)


# --- configs ------------------------------------------------------------------------------------


def test_the_configurations_are_there() -> None:
    assert set(CONFIGS) == {
        *("zero0", "zero1", "zero2", "zero3", "zero3_offload", "zeropp", "autotp", "bf16")
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_deepspeed_reads_every_key(name: str) -> None:
    assert debugging.unread(CONFIGS[name]) == []


def test_a_key_that_it_does_not_read_is_found() -> None:
    assert debugging.unread(CONFIGS["bf16"] | {"bf16_": {}}) == ["bf16_"]
    types = {"data_types": {"grad_acum_dtype": "fp32"}}
    assert debugging.unread(CONFIGS["bf16"] | types) == ["data_types.grad_acum_dtype"]


def flags_of(name: str, more: str = "") -> str:
    return f"--compare {GOLDEN} --deepspeed_config {CODE}/configs/{name}.json {more}"


@full
def test_each_trains_to_the_golden_losses_and_holds_what_is_predicted() -> None:
    """All but autotp (below) and bf16, which has other losses. In two micro batches too."""
    names = [(name, "") for name in CONFIGS if name.startswith("zero")]
    names += [(name, "--accumulate 2") for name in ("zero1", "zero3_offload", "zeropp")]
    cases = [(flags_of(*name), "", "") for name in names]
    assert failed_claims(SCRIPT, 2, cases) == [set() for _ in names]


class Gathers(TorchDispatchMode):
    """How many times each all-gather makes its input larger: the size of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "_allgather_base_" in function.name():
            self.sizes.append(args[0].numel() // args[1].numel())
        return function(*args, **(kwargs or {}))


def gathers_in_rank(config: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Group sizes of the gathers of the third step, forward and backward."""
    module = warm.load("chapter5_script", SCRIPT)
    module.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = module.ByteLlama(64, 2, 2, 32)
    engine = module.deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )[0]
    tokens = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        with Gathers() as forward:
            loss = engine(tokens).square().mean()
        with Gathers() as backward:
            engine.backward(loss)
        engine.step()
    return forward.sizes, backward.sizes


@full
def test_zeropp_gathers_for_backward_inside_of_a_node() -> None:
    """Four ranks as two nodes of two."""
    for forward, backward in warm.fork_ranks(gathers_in_rank, 4, CONFIGS["zeropp"]):
        assert (set(forward), set(backward)) == ({4}, {2})
    for forward, backward in warm.fork_ranks(gathers_in_rank, 4, CONFIGS["zero3"]):
        assert (set(forward), set(backward)) == ({4}, {4})


@full
def test_bf16_comes_near() -> None:
    """Bytes exactly; losses to what 16 bits give."""
    (failed,) = failed_claims(SCRIPT, 2, [(flags_of("bf16"), "", "")])
    away = [float(re.findall(r"= (\S+) <=", line)[0]) for line in failed if "loss - the" in line]
    assert away
    assert max(away) < 0.03
    assert {line for line in failed if "the file's" not in line} == set()


def hugging_face(module: Any, recipe: dict[str, Any]) -> Any:
    """transformers' Llama with the weights of chapter 3's model: AutoTP knows its layers by name."""
    import transformers

    torch.manual_seed(recipe["seed"])
    sizes = [recipe[name] for name in ("width", "layers", "heads", "context")]
    ours = module.ByteLlama(*sizes)
    width, layers, heads, context = sizes
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=ours.blocks[0].down.in_features,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            rms_norm_eps=torch.finfo(torch.float32).eps,
            tie_word_embeddings=False,
        )
    )
    weights = {
        "model.embed_tokens.weight": ours.embed.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.head.weight,
    }
    for number, block in enumerate(ours.blocks):
        at = f"model.layers.{number}"
        for name, weight in zip("qkv", block.qkv.weight.chunk(3), strict=True):
            weights[f"{at}.self_attn.{name}_proj.weight"] = weight
        for name, weight in zip(("gate", "up"), block.gate_up.weight.chunk(2), strict=True):
            weights[f"{at}.mlp.{name}_proj.weight"] = weight
        weights[f"{at}.self_attn.o_proj.weight"] = block.out.weight
        weights[f"{at}.mlp.down_proj.weight"] = block.down.weight
        weights[f"{at}.input_layernorm.weight"] = block.norm1.weight
        weights[f"{at}.post_attention_layernorm.weight"] = block.norm2.weight
    model.load_state_dict(weights)
    return model


def autotp_in_rank(golden: str, config: dict[str, Any]) -> tuple[list[float], list[float], int]:
    """Losses, gradient norms, and how many rows of a projection this rank has."""
    module = warm.load("chapter5_script", SCRIPT)
    module.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    recipe = json.loads(Path(golden).read_text())["recipe"]
    model = hugging_face(module, recipe)
    engine, optimizer, _, _ = module.deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    sys.argv[:] = ["train.py", "--compare", golden]
    args = module.parse_args()
    windows, _ = module.read_windows(args)
    sampler = module.ShareOfBatch(len(windows), args.batch, 0, 1, args.seed)  # all see all windows
    loader = torch.utils.data.DataLoader(windows, batch_size=None, sampler=sampler)
    losses, norms = [], []
    for step, window in enumerate(module.batches(loader, sampler, 0, args.steps)):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * module.learning_rate(step, args.warmup, args.steps)
        logits = engine(window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms, model.model.layers[0].self_attn.q_proj.weight.shape[0]


@full
def test_autotp_trains_to_the_golden_losses() -> None:
    golden = json.loads((warm.ROOT / GOLDEN).read_text())
    for losses, norms, rows in warm.fork_ranks(autotp_in_rank, 2, GOLDEN, CONFIGS["autotp"]):
        assert rows == golden["recipe"]["width"] // 2, "nothing was cut"
        pairs = zip(losses, golden["losses"], strict=True)
        assert max(abs(loss - right) for loss, right in pairs) <= 1e-5
        pairs = zip(norms, golden["norms"], strict=True)
        assert max(abs(norm / right - 1) for norm, right in pairs) <= 1e-4


# --- launch -------------------------------------------------------------------------------------


def test_hostfile_is_one_for_deepspeed() -> None:
    from deepspeed.launcher import runner

    assert runner.fetch_hostfile(str(LAUNCH / "hostfile")) == {"node-a": 8, "node-b": 8}
    comment = re.sub(r"\\?\n# *", " ", (LAUNCH / "hostfile").read_text())
    (command,) = re.findall(r"deepspeed --hostfile.*?--resume", comment)
    words = command.split()
    assert (warm.ROOT / words[2]).samefile(LAUNCH / "hostfile")
    args = runner.parse_args(words[1:])
    assert (warm.ROOT / args.user_script).samefile(SCRIPT)


@full
def test_hostfile_starts_a_process_for_each_slot_by_ssh() -> None:
    """What the launcher would type, with a pdsh that is none."""
    from deepspeed.launcher import multinode_runner, runner

    args = runner.parse_args(["--hostfile", str(LAUNCH / "hostfile"), str(SCRIPT), "--resume"])
    args.master_addr = "node-a"
    environment = dict(os.environ)
    pdsh = multinode_runner.PDSHRunner(args, "e30=")
    pools = runner.fetch_hostfile(args.hostfile)
    typed = " ".join(str(word) for word in pdsh.get_cmd(environment, pools)[0])
    assert "-w node-a,node-b" in typed
    assert "--master_addr=node-a" in typed
    assert typed.rstrip().endswith("train.py --resume")


def test_shell_script() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    for command in (["bash", "-n"], [shellcheck, "--shell=bash"]):
        done = subprocess.run(
            [*command, LAUNCH / "deepspeed.sbatch"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def manifest() -> list[dict[str, Any]]:
    """The ConfigMap, the Service and the Job."""
    return list(yaml.safe_load_all((LAUNCH / "k8s_job.yaml").read_text()))


@full
def test_manifest_is_of_the_published_schema() -> None:
    for document in manifest():
        assert kubernetes_validate.validate(document, "1.37", strict=True)


def test_manifest_agrees_with_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What no schema can see; and train.py takes its flags and its configuration."""
    config_map, service, job = manifest()
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    variables = {v["name"]: v.get("value") for v in container["env"]}
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert str(spec["completions"]) == str(spec["parallelism"]) == variables["NNODES"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert str(gpus) == variables["NPROC_PER_NODE"]
    assert (warm.ROOT / variables["SCRIPT"]).samefile(SCRIPT)
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounts["build"] == variables["TORCH_EXTENSIONS_DIR"]
    script = (warm.ROOT / container["command"][-1]).read_text()
    for variable in variables.keys() - {"TORCH_EXTENSIONS_DIR"}:
        assert re.search(rf'^: "\$\{{{variable}:', script, re.M), f"nobody reads {variable}"

    (volume,) = [v for v in pod["volumes"] if v["name"] == "config"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    config = json.loads(config_map["data"]["config.json"])
    assert debugging.unread(config) == []
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = [word.replace("/config/", f"{tmp_path}/") for word in container["args"]]
    out = flags.index("--out") + 1
    flags[out] = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    monkeypatch.setenv("WORLD_SIZE", str(spec["completions"] * gpus))
    args = warm.load("chapter5_script", SCRIPT).parse_args()
    assert args.accumulate * config["train_micro_batch_size_per_gpu"] * 16 == args.batch == 256


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@full
def test_slurm_job_on_two_nodes(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """A rank on each of two nodes trains to the golden losses, and leaves a checkpoint."""
    for name in (*book.CHAPTERS[2:5:2], "resources"):
        (tmp_path / name).symlink_to(warm.ROOT / name)
    small = ("--gpus-per-node=1", "--cpus-per-task=1", "--time=5")  # than the script asks
    job_script = str(FOLDER / "launch/deepspeed.sbatch")
    submitted = cluster.run(
        "sbatch", "--parsable", *small, "--export=ALL,DEVICE=cpu", job_script, "--compare", GOLDEN,
        cwd=tmp_path,
    )  # fmt: skip
    number = submitted.stdout.strip()
    assert number.isdecimal(), submitted.stderr
    job = cluster.wait(number, slurm.ENDED, timeout=120)
    logs = [tmp_path / f"zero-{number}-node{node}.log" for node in range(2)]
    texts = [log.read_text() for log in logs if log.exists()]
    assert (job["JobState"], job["NumNodes"]) == ("COMPLETED", "2"), f"{texts}\n{cluster.logs()}"
    (printed,) = [text for text in texts if "check:" in text]
    assert "2 ranks on cpu: 133,440 parameters" in printed
    assert re.search(r"^all \d+ checks ok$", printed, re.M)
    assert (tmp_path / f"runs/zero-{number}/step-000020").is_dir()
