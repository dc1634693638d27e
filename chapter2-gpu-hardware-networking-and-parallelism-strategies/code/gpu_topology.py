"""Show what is connected to what in a machine and how fast, and where its parallel groups belong.

    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/gpu_topology.py
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/gpu_topology.py --topo chapter2-gpu-hardware-networking-and-parallelism-strategies/code/topo_8gpu_nvswitch.txt \
        --plot chapter2-gpu-hardware-networking-and-parallelism-strategies/figures/topology.svg
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/gpu_topology.py --topo chapter2-gpu-hardware-networking-and-parallelism-strategies/code/topo_4gpu_bridges.txt

On GPUs:
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/gpu_topology.py

Look at "what follows": the fastest links say how many ranks of tensor parallelism fit, and the
nearest network card says which GPU should send through it. Section 2.2.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

KERNEL = Path("/sys")
# NUMA node, device, what joins it to it or to the next, next device
Row = tuple[str, str, str, str]
Group = tuple[str, list[str]]  # the link that joins a group, and the names of its GPUs
KINDS = {"0x02": "NIC", "0x03": "GPU", "0x12": "GPU", "0x0108": "NVMe"}  # PCI class codes
# nvidia-smi's names for the way between two devices, nearest first (legend of nvidia-smi topo -m)
PATHS = {
    "PIX": "at most one PCIe bridge",
    "PXB": "several PCIe bridges",
    "PHB": "a CPU's PCIe root",
    "NODE": "two PCIe roots of one NUMA node",
    "SYS": "the link between NUMA nodes",
}
# GB/s per NVLink and direction on data sheets: generation 1, 2 to 4, 5 (18 links: 900 both ways)
NVLINKS = (20.0, 25.0, 50.0)


def pcie_rate(gigatransfers: float, lanes: int) -> float:
    """GB/s per direction of a PCIe link: transfers of one bit per lane, less the encoding.

    PCI Express Base Specification: 8b/10b at 2.5 and 5 GT/s, 128b/130b up to 32 GT/s; from 64 GT/s
    on, flits of 256 bytes carry 236 bytes of packets.
    """
    payload = 8 / 10 if gigatransfers < 8 else 128 / 130 if gigatransfers < 64 else 236 / 256
    return gigatransfers * lanes * payload / 8


def tensor_parallel_groups(links: list[list[str]]) -> list[list[int]]:
    """Groups of GPUs in which NVLink joins every pair, the largest first; GPUs without it alone.

    `links` is the square matrix of `nvidia-smi topo -m`. Each group is a largest clique of the GPUs
    that are left (branch and bound as by Bron and Kerbosch, 1973).
    """
    left, groups = set(range(len(links))), []
    joined = [{j for j in left if links[i][j].startswith("NV")} for i in left]

    def largest(clique: list[int], candidates: set[int], best: list[int]) -> list[int]:
        best = max(best, clique, key=len)
        for gpu in sorted(candidates):
            if len(clique) + len(candidates) > len(best):
                candidates = candidates - {gpu}
                best = largest([*clique, gpu], candidates & joined[gpu], best)
        return best

    while left:
        groups.append(largest([], left, []))
        left = left - set(groups[-1])
    return groups


def parse_topology(text: str) -> dict:
    """Names, matrix of links and NUMA nodes from what `nvidia-smi topo -m` printed.

    Raises ValueError with the reason if rows or columns are missing or contradict each other.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # nvidia-smi underlines its header
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    header = next((words for words in lines if words[:1] == ["GPU0"]), [])
    names = header[: header.index("CPU")] if "CPU" in header else header
    rows = {
        words[0]: words[1:] for words in lines if words and words[0] in names and words != header
    }
    if not names or rows.keys() != set(names):
        raise ValueError("its header and its rows do not name the same devices")
    links = [rows[name][: len(names)] for name in names]
    for i, row in enumerate(links):
        if len(row) < len(names) or not all(
            re.fullmatch(r"X|NV\d+|" + "|".join(PATHS), x) for x in row
        ):
            raise ValueError(f"the row of {names[i]} is torn")
        for j, link in enumerate(row[:i]):
            if link != links[j][i]:
                raise ValueError(f"{names[j]} to {names[i]} is {links[j][i]}, but {link} back")
        if [k for k, link in enumerate(row) if link == "X"] != [i]:
            raise ValueError(f"the row of {names[i]} has no X at itself alone")
    places = {name: rows[name][len(names) :] for name in names if name.startswith("GPU")}
    nodes = {name: place[1] if len(place) > 1 else "not visible" for name, place in places.items()}
    return {"names": names, "links": links, "nodes": nodes}


def read(*parts: str | Path) -> str:
    """What a file of the kernel's says, or "" where there is none or it may not be read."""
    with contextlib.suppress(OSError):
        return Path(*parts).read_text().strip()
    return ""


def cpus_in(text: str) -> list[int]:
    """'0-2,8' as [0, 1, 2, 8]."""
    ends = [[int(end) for end in part.split("-")] for part in text.split(",") if part]
    return [cpu for part in ends for cpu in range(part[0], part[-1] + 1)]


def devices(nodes: list[str]) -> list[Row]:
    """GPUs, network cards and NVMe disks on PCI, with the GB/s per direction of their links."""
    rows = []
    for folder in sorted(KERNEL.glob("bus/pci/devices/*")):
        code, node = read(folder, "class"), read(folder, "numa_node")
        kind = next((kind for prefix, kind in KINDS.items() if code.startswith(prefix)), None)
        speed, lanes = (read(folder, f"current_link_{what}") for what in ("speed", "width"))
        number, link = re.match(r"[\d.]+", speed), "PCIe not visible"
        if number and lanes.isdecimal():
            link = f"{pcie_rate(float(number[0]), int(lanes)):.1f} GB/s, {number[0]} GT/s x{lanes}"
        wires = [f"{p.parts[-4]} {read(p)}" for p in folder.glob("infiniband/*/ports/*/rate")]
        for port in [*folder.glob("net/*"), *folder.glob("virtio*/net/*")]:
            rate = read(port, "speed")  # Mbit/s
            wires.append(f"{port.name} {rate + ' Mbit/s' if rate.isdecimal() else 'not visible'}")
        if kind:
            place = f"NUMA node {node}" if node in nodes else "NUMA node not visible"
            rows.append((place, f"{kind} {folder.name}", link, ", ".join(wires)))
    return rows


def look_at_machine() -> tuple[list[Row], dict[str, int]]:
    """This machine as the kernel describes it, and what that description counts wrongly."""
    rows = []
    homes = []
    folders = sorted(KERNEL.glob("devices/system/node/node[0-9]*"))
    if not folders:
        rows.append(("NUMA node not visible", "CPUs", str(os.cpu_count()), "memory not visible"))
    for folder in folders:
        name = f"NUMA node {folder.name[4:]}"
        cpus = cpus_in(read(folder, "cpulist"))
        memory = re.search(r"MemTotal:\s+(\d+)", read(folder, "meminfo"))
        size = f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "memory not visible"
        rows.append((name, "CPUs", str(len(cpus)), f"{size}, distances {read(folder, 'distance')}"))
        homes += cpus
        found: dict[str, dict[str, str]] = {}  # by level of cache: sizes by the CPUs that share it
        for cpu in cpus:
            for index in KERNEL.glob(f"devices/system/cpu/cpu{cpu}/cache/index*"):
                level = f"L{read(index, 'level')} {read(index, 'type')}"
                found.setdefault(level, {})[read(index, "shared_cpu_list")] = read(index, "size")
        for level, sharers in sorted(found.items()):
            sizes = " ".join(sorted(set(sharers.values())))
            end = f"of CPUs {' | '.join(sharers)}"
            rows.append((name, level, f"{len(sharers)} x {sizes}", end))
    rows += devices([folder.name[4:] for folder in folders])
    usable = os.sched_getaffinity(0) if folders and hasattr(os, "sched_getaffinity") else ()
    homeless = sum(homes.count(cpu) != 1 for cpu in usable)
    return rows, {"usable CPUs that are not in exactly one NUMA node": homeless}


def look_at_gpus(topology: dict, per_link: float) -> tuple[list[Row], list[Group], dict[str, int]]:
    """GPUs with their nearest cards, the groups that NVLink joins, and what is wrong with those."""
    names, links, nodes = topology["names"], topology["links"], topology["nodes"]
    gpus = [i for i, name in enumerate(names) if name in nodes]
    rows = []
    for gpu in gpus:
        ways = zip(names, links[gpu], strict=True)
        cards = {name: way for name, way in ways if name not in nodes}
        path = min(cards.values(), key=[*PATHS].index, default="no way")
        nearest = " ".join(name for name, way in cards.items() if way == path)
        rows.append((f"NUMA node {nodes[names[gpu]]}", names[gpu], path, nearest or "out"))
    square = [[links[i][j] for j in gpus] for i in gpus]
    cliques = tensor_parallel_groups(square)
    groups = []
    slow = 0
    for clique in cliques:
        within = [square[a][b] for a in clique for b in clique if a != b]
        counts = [int(link[2:]) if link.startswith("NV") else 0 for link in within]
        slow += counts.count(0)
        text = f"NV{min(counts)}, {min(counts) * per_link:g} GB/s" if counts else "no NVLink"
        groups.append((text, [names[gpus[k]] for k in clique]))
    wrong = sum(sum(k in clique for clique in cliques) != 1 for k in range(len(gpus)))
    counted = {"GPUs that are not in exactly one group": wrong}
    return rows, groups, counted | {"pairs in a group that no NVLink joins": slow}


def nominal_rate(raw: float) -> float:
    """A data sheet's GB/s for the line rate that the driver tells, which counts the encoding too.

    H100 and H200 report 26.562 GB/s per link, the sheet says 25 (18 links: 450).
    """
    return min(NVLINKS, key=lambda nominal: abs(nominal - raw))


def nvidia_topology() -> tuple[dict | None, float]:
    """What the driver tells: the matrix of links, and the GB/s per NVLink and direction."""
    topology, rate = None, 25.0
    with contextlib.suppress(Exception):  # no driver, no library, or no such link
        command = ["nvidia-smi", "topo", "-m"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        topology = parse_topology(done.stdout)
        import pynvml as nvml

        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        field = nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON
        raw = nvml.nvmlDeviceGetFieldValues(gpu, [field])[0].value.uiVal / 1e3
        rate = nominal_rate(raw) if raw else rate
    return topology, rate


def plot(rows: list[Row], groups: list[Group], path: Path) -> None:
    """Draw a row per device inside its NUMA node, and a bus along each group of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch02"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 0.4 * len(rows) + 0.6), layout="tight")
    for node in dict.fromkeys(row[0] for row in rows):
        inside = [y for y, row in enumerate(rows) if row[0] == node]
        axis.axhspan(inside[0] - 0.45, inside[-1] + 0.45, color="#eef1f5")
        axis.text(9.9, inside[0], node, ha="right", va="center", color="#555")
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "#1f77b4"}
    for y, (_, name, link, end) in enumerate(rows):
        axis.plot([2, 5], [y, y], color="#999", lw=1, zorder=1)
        for x, text in ((2, name), (5, end)):
            axis.text(x, y, text, ha="center", va="center", bbox=box, size=8)
        axis.text(3.5, y - 0.05, link, ha="center", va="bottom", size=7, color="#333")
    for number, (text, members) in enumerate(groups):
        ys = [y for y, row in enumerate(rows) if row[1] in members]
        x = 0.9 - 0.3 * (number % 3)
        axis.plot([x, x], [ys[0], ys[-1]], color=f"C{number + 1}", lw=4)
        for y in ys:
            axis.plot([x, 2], [y, y], color=f"C{number + 1}", lw=2, zorder=1)
        axis.text(x - 0.1, sum(ys) / len(ys), text, rotation=90, ha="right", va="center", size=8)
    axis.set(xlim=(0, 10), ylim=(len(rows) - 0.4, -0.6))
    axis.set_axis_off()
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def run(args: argparse.Namespace) -> list[bool | None]:
    if args.topo:
        rows, wrong = [], {}
        topology, rate = args.topo, 25.0
    else:
        rows, wrong = look_at_machine()
        topology, rate = nvidia_topology()
    groups: list[Group] = []
    if topology:
        found, groups, counted = look_at_gpus(topology, args.nvlink or rate)
        rows = sorted(rows + found, key=lambda row: row[0])
        wrong |= counted
    say(f"1 process on {'cuda' if topology and not args.topo else 'cpu'}: what is joined to what")
    last = ""
    for node, name, link, end in rows:
        say(f"{node}\n" * (node != last) + f"  {name:<16} {link}  {end}")
        last = node
    say("for scale, GB/s per direction (a data sheet often adds both directions)")
    say(f"  PCIe 4.0, 5.0 x16  {pcie_rate(16, 16):.1f}, {pcie_rate(32, 16):.1f}")
    say(f"  InfiniBand NDR     {400 / 8:.1f}, 400 Gbit/s")
    for name, between in PATHS.items() if topology else ():
        say(f"  {name:<18} those of {between}")
    say("what follows")
    for text, members in groups:
        say(f"  tensor parallelism of at most {len(members)}: {' '.join(members)}  {text}")
    if groups:
        say("  pipeline and data parallelism between groups, each GPU through its nearest card")
    else:
        most = max(int(link) for _, name, link, _ in rows if name == "CPUs")
        say(f"  ranks that share a tensor: in one NUMA node, which has at most {most} CPUs")
    if args.plot:
        plot(rows, groups, args.plot)
    return [check(claim, count, 0) for claim, count in wrong.items()]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--topo", type=Path, help="study this saved output of nvidia-smi topo -m, not the machine")
    add("--nvlink", type=float, help="GB/s per NVLink and direction; default: the driver's, or 25")
    add("--plot", type=Path, help="also draw it to this SVG file")
    args = parser.parse_args()
    try:
        args.topo = parse_topology(args.topo.read_text()) if args.topo else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        stop(f"--topo {args.topo}: {reason}; give what  nvidia-smi topo -m  printed")
    return args


def main() -> None:
    sys.exit(conclude(run(parse_args())))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.check
def check(claim: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Print whether a value keeps its bound, as it must anywhere; a rank where it does not speaks."""
    held = bool(value >= bound if at_least else value <= bound)  # False for NaN
    line = f"check: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}"
    if held:
        say(f"{line}  ok")
    else:
        print(f"{line}  FAILED on rank {os.environ.get('RANK', '0')}", flush=True)
    return held


# Copied from ch01_single_gpu_baseline.conclude
def conclude(claims: list[bool | None]) -> int:
    """Print the last line of a run, and return its exit code; an `expect` that is None is no check."""
    judged = [held for held in claims if held is not None]
    failed = judged.count(False)
    say(f"{failed} of {len(judged)} checks FAILED" if failed else f"all {len(judged)} checks ok")
    return int(failed > 0)


# Copied from ch01_single_gpu_baseline.say
def say(line: str) -> None:
    """Print on rank 0. A reader who has seen enough (`| head`) does not end the run."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Copied from ch01_single_gpu_baseline.stop
def stop(message: str) -> NoReturn:
    """End with one line and exit code 2: the command was wrong, not the program."""
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


if __name__ == "__main__":
    main()
