"""Chapter 2's scripts on one machine: bandwidth, the roofline, topologies of many kinds."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import warm
from mutants import failed_claims

CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
Run = Callable[..., warm.Result]
BANDWIDTH = "--max-bytes 1M --repeats 3"
GEMM = "--width 128 --stream 8M --repeats 1 --dtypes float32"


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "variants"),
    [
        (
            "bandwidth_test.py",
            (
                f"{BANDWIDTH} --dtype bfloat16 --seed 20260101 --threads 1",
                "--min-bytes 3000 --max-bytes 70001 --factor 3 --repeats 1 --seed 2",
            ),
        ),
        (
            "gemm_roofline.py",
            (f"{GEMM} --seed 20260101", f"{GEMM} float64 bfloat16 --seed 2"),
        ),
    ],
)
def test_holds_what_it_claims(script: str, variants: tuple[str, ...]) -> None:
    cases = [(flags, "", "") for flags in variants]
    assert failed_claims(warm.ROOT / CODE / script, 1, cases) == [set()] * len(cases)


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "flags", "mutants"),
    [
        (
            "bandwidth_test.py",
            BANDWIDTH,
            [
                ("a.copy_(b)", "a[1:].copy_(b[1:])"),  # one element stays behind
                # moves a third of what it counts
                ("a.copy_(b)", "a[: len(a) // 3].copy_(b[: len(a) // 3])"),
                ("alpha=3.0", "alpha=2.0"),
            ],
        ),
        (
            "gemm_roofline.py",
            GEMM,
            [
                ("torch.mm(a, next(turn), out=out)", "a"),  # nothing is multiplied, in no time
                ("m * k + k * n + m * n", "m * k + m * n"),  # the weights are not counted
                ("flop = 2 * m * k * n", "flop = 4 * m * k * n"),
            ],
        ),
    ],
)
def test_mutants_are_caught(script: str, flags: str, mutants: list[tuple[str, str]]) -> None:
    cases = [(flags, right, wrong) for right, wrong in mutants]
    failed = failed_claims(warm.ROOT / CODE / script, 1, cases)
    assert [bool(lines) for lines in failed] == [True] * len(cases), failed


@pytest.mark.full
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("bandwidth_test.py --min-bytes 64", "--min-bytes is 1K or more"),
        ("bandwidth_test.py --factor 1", "--factor 2 or more"),
        ("bandwidth_test.py --max-bytes 1K", "is not between --min-bytes"),
        ("bandwidth_test.py --max-bytes 99999G", "is not between --min-bytes"),
        ("gemm_roofline.py --width 31", "--width 31"),
        ("gpu_topology.py --topo no-such-file", "No such file"),
        ("gpu_topology.py --topo /dev/null", "its header and its rows"),
    ],
)
def test_bad_input_gets_one_line(run: Run, line: str, says: str) -> None:
    result = run(f"python {CODE}/{line}")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("64", 64), ("16K", 2**14), ("1m", 2**20), ("2G", 2**31)]
)
def test_sizes(text: str, size: int) -> None:
    script = warm.load("bandwidth_test", warm.ROOT / CODE / "bandwidth_test.py")
    assert script.parse_size(text) == size


def test_a_dtype_without_a_unit_is_measured_once_and_small(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CPU that is told to be a thousand times slower in bfloat16 ends soon, and says why."""
    script = warm.load("gemm_roofline", warm.ROOT / CODE / "gemm_roofline.py")
    monkeypatch.setattr(
        script, "small_rate", lambda name, device: {"bfloat16": 1e9}.get(name, 1e11)
    )
    flags = "--width 512 --stream 8M --repeats 2 --dtypes float32 bfloat16"
    monkeypatch.setattr(sys, "argv", ["gemm_roofline.py", *flags.split()])
    args = script.parse_args()
    script.run(args, script.pick_device("cpu"))
    printed = capsys.readouterr().out
    assert re.search(r"^bfloat16 .*emulated", printed, re.M)
    assert not re.search(r"^float32 .*emulated", printed, re.M)
    assert re.search(r"^training +float32 +512 ", printed, re.M)
    assert re.search(r"^training +bfloat16 +256 ", printed, re.M)


# --- groups, rates and parsing -----------------------------------------------------------------


@pytest.fixture
def topology() -> ModuleType:
    return warm.load("gpu_topology", warm.ROOT / CODE / "gpu_topology.py")


@pytest.mark.full
@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("GPU1\tNV12", "GPU1\tSYS", "GPU0 to GPU1"),  # asymmetric
        ("GPU1\tNV12\t X \tSYS\tSYS\tNODE\t0-31\t0\t\tN/A\n", "", "rows"),  # a row is missing
        ("GPU3\tSYS\tSYS\tNV12\t X \tSYS", "GPU3\tSYS\tSYS", "GPU3"),  # cut off within a row
        ("\tGPU0\tGPU1\tGPU2", "\tGPU0\tGPU2", "GPU2"),  # a column is missing
        ("NV12", "NVL", "GPU0"),  # no link has that name
        ("GPU0\t X \tNV12", "GPU0\tSYS\tNV12", "GPU0"),  # no X on the diagonal
        ("GPU2\tSYS", "GPU1\tSYS", "rows"),  # a row twice
    ],
)
def test_a_torn_topology_is_refused(
    topology: ModuleType, right: str, wrong: str, says: str
) -> None:
    source = (warm.ROOT / CODE / "topo_4gpu_bridges.txt").read_text()
    assert right in source
    with pytest.raises(ValueError, match=says):
        topology.parse_topology(source.replace(right, wrong))


def matrix(gpus: int, *pairs: tuple[int, int], link: str = "NV2") -> list[list[str]]:
    links = [["X" if i == j else "SYS" for j in range(gpus)] for i in range(gpus)]
    for i, j in pairs:
        links[i][j] = links[j][i] = link
    return links


def all_pairs(*gpus: int) -> list[tuple[int, int]]:
    return [(i, j) for i in gpus for j in gpus if i < j]


CUBE = [*all_pairs(0, 1, 2, 3), *all_pairs(4, 5, 6, 7), (0, 4), (1, 5), (2, 6), (3, 7)]  # DGX-1


@pytest.mark.parametrize(
    ("links", "groups"),
    [
        (matrix(1), [[0]]),
        (matrix(2), [[0], [1]]),
        (matrix(2, link="PIX"), [[0], [1]]),
        (matrix(3, (0, 1), (1, 2)), [[0, 1], [2]]),  # a chain is no clique
        (matrix(4, (0, 2), (1, 3)), [[0, 2], [1, 3]]),
        (matrix(8, *CUBE), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (matrix(5, (0, 1), *all_pairs(2, 3, 4), (1, 2)), [[2, 3, 4], [0, 1]]),  # largest first
        (matrix(16, *all_pairs(*range(16)), link="NV18"), [list(range(16))]),
    ],
)
def test_groups_are_largest_cliques(
    topology: ModuleType, links: list[list[str]], groups: list[list[int]]
) -> None:
    assert topology.tensor_parallel_groups(links) == groups


@pytest.mark.parametrize(
    ("gigatransfers", "lanes", "rate"),
    # GB/s per direction in PCI-SIG's own rounding: x1 of generation 2 is 0.5, x16 of 3 is 15.75
    [(2.5, 1, 0.25), (5.0, 1, 0.5), (8.0, 16, 15.75), (16.0, 16, 31.5), (32.0, 16, 63.0), (64.0, 16, 118.0)],
)  # fmt: skip
def test_pcie_rates(topology: ModuleType, gigatransfers: float, lanes: int, rate: float) -> None:
    assert topology.pcie_rate(gigatransfers, lanes) == pytest.approx(rate, rel=1e-3)


@pytest.mark.full
def test_parses_what_nvidia_smi_prints(topology: ModuleType) -> None:
    """Underlined header, older columns, cards called by their driver's names."""
    text = (
        "\x1b[4m\tGPU0\tGPU1\tmlx5_0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
        "GPU0\t X \tNV4\tPXB\t0-15\t3\n"
        "GPU1\tNV4\t X \tSYS\t16-31\t1\n"
        "mlx5_0\tPXB\tSYS\t X \t\t\n\nLegend:\n\n  X    = Self\n"
    )
    parsed = topology.parse_topology(text)
    assert parsed["names"] == ["GPU0", "GPU1", "mlx5_0"]
    assert parsed["nodes"] == {"GPU0": "3", "GPU1": "1"}
    rows, groups, wrong = topology.look_at_gpus(parsed, 25.0)
    assert rows[0] == ("NUMA node 3", "GPU0", "PXB", "mlx5_0")
    assert groups == [("NV4, 100 GB/s", ["GPU0", "GPU1"])]
    assert set(wrong.values()) == {0}


@pytest.mark.full
def test_a_kernel_that_tells_nothing(
    topology: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "KERNEL", tmp_path)
    rows, wrong = topology.look_at_machine()
    assert [row[0] for row in rows] == ["NUMA node not visible"]
    assert set(wrong.values()) == {0}


@pytest.mark.full
def test_two_sockets_with_a_card(
    topology: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files as Linux writes them on a machine that is not this one."""
    card = "bus/pci/devices/0000:5e:00.0"
    files = {
        "devices/system/node/node0/cpulist": "0-1",
        "devices/system/node/node1/cpulist": "2-3",
        "devices/system/node/node1/distance": "21 10",
        **{f"devices/system/cpu/cpu{n}/cache/index3/level": "3" for n in range(4)},
        **{f"devices/system/cpu/cpu{n}/cache/index3/type": "Unified" for n in range(4)},
        **{f"devices/system/cpu/cpu{n}/cache/index3/size": "32768K" for n in range(4)},
        **{
            f"devices/system/cpu/cpu{n}/cache/index3/shared_cpu_list": f"{n // 2 * 2}-{n // 2 * 2 + 1}"
            for n in range(4)
        },
        f"{card}/class": "0x020700",
        f"{card}/numa_node": "1",
        f"{card}/current_link_speed": "32.0 GT/s PCIe",
        f"{card}/current_link_width": "16",
        f"{card}/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(topology, "KERNEL", tmp_path)
    rows, _ = topology.look_at_machine()
    assert ("NUMA node 0", "L3 Unified", "1 x 32768K", "of CPUs 0-1") in rows
    mlx = (
        "NUMA node 1",
        "NIC 0000:5e:00.0",
        "63.0 GB/s, 32.0 GT/s x16",
        "mlx5_0 400 Gb/sec (4X NDR)",
    )
    assert mlx in rows
    (tmp_path / "devices/system/node/node1/cpulist").write_text("0-3\n")  # two nodes claim a CPU
    assert topology.look_at_machine()[1]["usable CPUs that are not in exactly one NUMA node"] > 0


@pytest.mark.parametrize(
    ("raw", "nominal"),
    # what `nvidia-smi nvlink -s` prints on a V100, an H100 and a B200; what their sheets say
    [(25.781, 25.0), (26.562, 25.0), (53.125, 50.0)],
)
def test_nvlink_as_the_data_sheet_counts(topology: ModuleType, raw: float, nominal: float) -> None:
    assert topology.nominal_rate(raw) == nominal


@pytest.mark.full
@pytest.mark.parametrize("groups", [[[0, 1, 2], [3]], [[0, 1], [1, 2], [3]], [[0, 1], [2]]])
def test_wrong_groups_are_counted(
    topology: ModuleType, monkeypatch: pytest.MonkeyPatch, groups: list[list[int]]
) -> None:
    """A group without a link, a GPU in two groups, a GPU in none: the script's checks see it."""
    text = (warm.ROOT / CODE / "topo_4gpu_bridges.txt").read_text()
    monkeypatch.setattr(topology, "tensor_parallel_groups", lambda links: groups)
    _, _, wrong = topology.look_at_gpus(topology.parse_topology(text), 25.0)
    assert sum(wrong.values()) > 0
