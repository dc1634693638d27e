"""Chapter 2's scripts on one machine: bandwidth against C, the roofline, topologies of many kinds."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import book
import checks
import pytest
import warm

CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
Run = Callable[..., warm.Result]
BANDWIDTH = "bandwidth_test.py --max-bytes 1M --repeats 3"
GEMM = "gemm_roofline.py --width 384 --stream 64M --repeats 2"
SWITCH, BRIDGES = (f"--topo {CODE}/topo_{name}.txt" for name in ("8gpu_nvswitch", "4gpu_bridges"))
TRIAD = """
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {
    long n = atol(argv[1]), repeats = atol(argv[2]);
    float *a = malloc(4 * n), *b = malloc(4 * n), *c = malloc(4 * n);
    double best = 1e9;
    #pragma omp parallel for
    for (long i = 0; i < n; i++) a[i] = 0, b[i] = 1, c[i] = 2;
    for (long r = 0; r < repeats; r++) {
        double start = omp_get_wtime();
        #pragma omp parallel for
        for (long i = 0; i < n; i++) a[i] = b[i] + 3.0f * c[i];
        double seconds = omp_get_wtime() - start;
        if (seconds < best) best = seconds;
    }
    printf("%f", 12 * n / best / 1e9);
    return a[n - 1] != 7;
}
"""


@pytest.mark.parametrize(
    "line",
    [
        BANDWIDTH,
        f"{BANDWIDTH} --dtype bfloat16 --seed 1 --threads 1",
        "bandwidth_test.py --min-bytes 3000 --max-bytes 70001 --factor 3 --repeats 1 --seed 2",
        f"{GEMM} --seed 1",
        f"{GEMM} --seed 2 --dtypes float64 bfloat16",
        "gpu_topology.py",
        f"gpu_topology.py {SWITCH} --nvlink 50",
    ],
)
def test_holds_what_it_claims(run: Run, line: str) -> None:
    command = f"python {CODE}/{line}"
    result = run(command)
    parsed = book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    assert result.stderr == ""
    assert result.stdout.startswith("1 process on ")


@pytest.mark.parametrize("line", [BANDWIDTH, GEMM, "gpu_topology.py", f"gpu_topology.py {BRIDGES}"])
def test_plots(run: Run, line: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    result = run(f"python {CODE}/{line} --plot {picture}")
    assert result.returncode == 0, result.stderr
    assert not checks.drawn(picture)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("bandwidth_test.py --min-bytes 0", "--min-bytes"),
        ("bandwidth_test.py --min-bytes 64", "--min-bytes"),
        ("bandwidth_test.py --max-bytes 1K", "--max-bytes"),
        ("bandwidth_test.py --max-bytes 99999G", "--max-bytes"),
        ("bandwidth_test.py --max-bytes -1M", "--max-bytes"),
        ("bandwidth_test.py --factor 1", "--factor"),
        ("bandwidth_test.py --dtype int8", "--dtype"),
        ("bandwidth_test.py --json /dev/null/x.json", "/dev/null/x.json"),
        ("gemm_roofline.py --width 64", "--width"),
        ("gemm_roofline.py --dtypes float8", "--dtypes"),
        ("gemm_roofline.py --repeats 0", "--repeats"),
        ("gemm_roofline.py --plot /dev/null/x.svg", "/dev/null/x.svg"),
        *((f"{script}.py --device abacus", "--device") for script in ("bandwidth_test", "gemm_roofline")),
        ("gpu_topology.py --no-such-flag", "--help"),
        ("gpu_topology.py --topo no-such-file", "no-such-file"),
        ("gpu_topology.py --topo /dev/null", "/dev/null"),
        ("gpu_topology.py --nvlink 0", "--nvlink"),
        ("gpu_topology.py --plot /dev/null/x.svg", "/dev/null/x.svg"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(run: Run, line: str, says: str) -> None:
    expect_one_line(run(f"python {CODE}/{line}"), says)


def expect_one_line(result: warm.Result, says: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr


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
def test_torn_topology_gets_one_line(
    run: Run, checkout: Path, tmp_path: Path, right: str, wrong: str, says: str
) -> None:
    source = (checkout / CODE / "topo_4gpu_bridges.txt").read_text()
    assert right in source
    torn = tmp_path / "torn.txt"
    torn.write_text(source.replace(right, wrong))
    expect_one_line(run(f"python {CODE}/gpu_topology.py --topo {torn}"), says)


# --- groups, rates and parsing -----------------------------------------------------------------


@pytest.fixture
def topology(checkout: Path) -> ModuleType:
    return warm.load("gpu_topology", checkout / CODE / "gpu_topology.py")


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


def test_a_kernel_that_tells_nothing(
    topology: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "KERNEL", tmp_path)
    rows, wrong = topology.look_at_machine()
    assert rows == []
    assert set(wrong.values()) == {0}


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
    rows, wrong = topology.look_at_machine()
    assert ("NUMA node 0", "L3 Unified", "1 x 32768K", "of CPUs 0-1") in rows
    mlx = (
        "NUMA node 1",
        "NIC 0000:5e:00.0",
        "63.0 GB/s, 32.0 GT/s x16",
        "mlx5_0 400 Gb/sec (4X NDR)",
    )
    assert mlx in rows
    assert wrong["CPUs counted twice in one level of cache"] == 0
    (tmp_path / "devices/system/node/node1/cpulist").write_text("0-3\n")  # two nodes claim a CPU
    assert topology.look_at_machine()[1]["usable CPUs that are not in exactly one NUMA node"] > 0


# --- broken on purpose, and against C ----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "right", "wrong"),
    [
        (BANDWIDTH, "a.copy_(b)", "a[1:].copy_(b[1:])"),  # one element stays behind
        (BANDWIDTH, "alpha=3.0", "alpha=2.0"),
        # moves a third of what it counts, and is compared with what it should have computed
        (BANDWIDTH, "a.copy_(b)", "a[: len(a) // 3].copy_(b[: len(a) // 3])"),
        (GEMM, "torch.mm(a, next(turn), out=out)", "a"),  # nothing is multiplied, in no time
        (GEMM, "torch.mm(a, weights[0], out=out)", "torch.mm(a, weights[0].flip(0), out=out)"),
        (GEMM, "m * k + k * n + m * n", "m * k + m * n"),  # the weights are not counted
        (GEMM, "flop, moved = 2 * m * k * n", "flop, moved = 4 * m * k * n"),
        (f"gpu_topology.py {SWITCH}", "left = left - set(groups[-1])", "left = left - {min(left)}"),
        (f"gpu_topology.py {BRIDGES}", 'links[i][j].startswith("NV")', "i != j"),
        ("gpu_topology.py", 'homes += cpus', "homes += cpus + cpus"),
    ],
)  # fmt: skip
def test_mutants_are_caught(run: Run, checkout: Path, line: str, right: str, wrong: str) -> None:
    """Break the script: its own checks must see it, and its exit code must say so."""
    name, _, flags = line.partition(" ")
    source = (checkout / CODE / name).read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"mutant_{name}"
    mutant.write_text(source.replace(right, wrong))
    result = run(f"python {CODE}/{mutant.name} {flags}", timeout=40)
    mutant.unlink()
    assert result.returncode == 1, result.stderr
    assert "FAILED" in result.stdout


def test_triad_is_as_fast_as_c(run: Run, tmp_path: Path) -> None:
    """The triad beyond the caches against STREAM's in C: the same bytes, threads and arithmetic."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler: apt install gcc")
    (tmp_path / "triad.c").write_text(TRIAD)
    build = [compiler, "-O3", "-march=native", "-fopenmp", "triad.c", "-o", "triad"]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=60)
    size, ours, theirs = 512 * 2**20, 0.0, 0.0
    for _ in range(5):  # the machine has other tenants: the fastest of both, and taken in turns
        answer = tmp_path / "bandwidth.json"
        flags = f"--min-bytes {size} --max-bytes {size} --repeats 10 --json {answer}"
        result = run(f"python {CODE}/bandwidth_test.py {flags}")
        assert result.returncode == 0, result.stderr
        record = json.loads(answer.read_text())
        ours = max(ours, *(r["fastest"] for r in record["rows"] if r["kernel"] == "triad"))
        program = subprocess.run(
            [tmp_path / "triad", str(size // 12), "10"],
            env={"OMP_NUM_THREADS": str(record["threads"])},
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        theirs = max(theirs, float(program.stdout))
        if ours >= 0.95 * theirs:
            break
    assert ours >= 0.95 * theirs
