"""Cards, their driver, and what connects them; which network processes on the CPU would talk by."""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterator, Mapping

from xdit_compile.plan.host import may_have_cuda

from .finding import MISSING, OK, WARN, Finding, output_of

LIMIT_S = 20.0
QUERY = "index,name,memory.total,compute_cap,driver_version"
LINK_KINDS = {
    "NV": "NVLink", "PIX": "one PCIe bridge", "PXB": "several PCIe bridges", "PHB": "the PCIe host bridge",
    "NODE": "PCIe within a NUMA node", "SYS": "PCIe between NUMA nodes",
}  # fmt: skip
"""What ``nvidia-smi topo -m`` calls the way between two cards, from the fastest to the slowest."""
SLOW = ("SYS", "NODE", "PHB")


def devices() -> Iterator[Finding]:
    """The cards, as their driver and PyTorch see them."""
    said, why_not = output_of(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], LIMIT_S)
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.count(",") == 4]
    for index, name, memory, capability, driver in rows:
        yield Finding(f"card {index}", OK, f"{name}, {memory}, sm_{capability.replace('.', '')}, driver {driver}")
    if why_not and may_have_cuda():
        yield Finding("driver", WARN, why_not, "install the tools of the driver, or give the container --gpus all")
    yield from _seen_by_torch(len(rows))


def _seen_by_torch(cards: int) -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", MISSING, f"cannot be imported: {error}", "install torch again (make env)", True)
        return
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None and (cards or may_have_cuda()):
        built = "was built without CUDA" if torch.version.cuda is None and torch.version.hip is None else "sees none"
        remedy = "install a build of torch for CUDA (make env TORCH_INDEX=URL)"
        if torch.version.cuda is not None:
            remedy = f"see that the driver is new enough for CUDA {torch.version.cuda}, and CUDA_VISIBLE_DEVICES"
        yield Finding("computes on", WARN, f"cpu: there are cards, and torch {torch.__version__} {built}", remedy)
    elif kind is None:
        cores = len(os.sched_getaffinity(0))
        yield Finding(
            "computes on", OK, f"cpu: no accelerator is here; {cores} cores, {torch.get_num_threads()} threads"
        )
    else:
        count = torch.accelerator.device_count()
        yield Finding("computes on", OK, f"{kind.type}: {count} visible, so --nproc {count} at most")
        if count < cards:
            yield Finding("visible", WARN, f"{count} of {cards} cards", "see CUDA_VISIBLE_DEVICES")


def links() -> Iterator[Finding]:
    """What connects cards, and what ranks can send by."""
    said, why_not = output_of(["nvidia-smi", "topo", "-m"], LIMIT_S)
    pairs = links_in(said)
    slow = sorted({kind for kind in pairs.values() if kind in SLOW})
    if pairs:
        kinds = ", ".join(f"{LINK_KINDS.get(re.sub(r'[0-9]+$', '', kind), kind)} ({kind})" for kind in dict.fromkeys(
            sorted(pairs.values())
        ))  # fmt: skip
        remedy = (
            "put the degrees that talk least first (--mesh_order), or try --pipefusion_parallel_degree" if slow else ""
        )
        yield Finding("between cards", WARN if slow else OK, kinds, remedy)
    else:
        few = "there are fewer than two"
        yield Finding("between cards", OK, few if not why_not or not may_have_cuda() else f"not known: {why_not}")
    yield from _senders()
    yield interface()


def links_in(matrix: str) -> dict[tuple[str, str], str]:
    """How ``nvidia-smi topo -m`` says that each pair of cards is connected."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in matrix.splitlines()]
    names = next((re.findall(r"\bGPU\d+\b", line) for line in lines if re.match(r"\s+GPU0\b", line)), [])
    pairs = {}
    for line in lines:
        cells = line.split()
        if cells and cells[0] in names and len(cells) > len(names):
            for other, kind in zip(names, cells[1:], strict=False):
                if other > cells[0] and kind != "X":
                    pairs[cells[0], other] = kind
    return pairs


def _senders() -> Iterator[Finding]:
    try:
        import torch.distributed as dist
    except (ImportError, OSError):
        return
    there = dist.is_available()
    gloo, nccl = there and dist.is_gloo_available(), there and dist.is_nccl_available()
    install = "install a build of torch with it"
    yield Finding("gloo", OK if gloo else MISSING, "available" if gloo else "torch was built without it", install, True)
    cuda = may_have_cuda()
    if nccl:
        yield Finding(
            "nccl", OK, f"available, {'.'.join(map(str, _version_of_nccl()))}" if cuda else "available; no card here"
        )
    else:
        said = "torch was built without it" + ("" if cuda else ", and there is no card that needs it")
        yield Finding("nccl", WARN if cuda else OK, said, "install a build of torch for CUDA" if cuda else "")


def _version_of_nccl() -> tuple[int, ...]:
    import torch

    found = torch.cuda.nccl.version()
    return found if isinstance(found, tuple) else (found,)


def interface(environment: Mapping[str, str] = os.environ) -> Finding:
    """The network by which gloo would talk: what ``GLOO_SOCKET_IFNAME`` names, or else that of the host's name, or else
    the loopback, as in ``ProcessGroupGloo::createDefaultDevice``."""
    addresses = addresses_by_interface()
    variable = "GLOO_SOCKET_IFNAME"
    if name := environment.get(variable):
        wanted = [each for each in name.split(",") if each not in addresses]
        if wanted:
            remedy = f"set it to one of {', '.join(addresses)}, or unset it"
            return Finding(
                "network", WARN, f"{variable}={name}, and there is no {', '.join(wanted)} with an address", remedy
            )
        return Finding("network", OK, f"{name} ({variable})")
    host = socket.gethostname()
    try:
        addressed = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        return Finding(
            "network", WARN, f"the host's name {host} has no address ({error}); gloo takes the loopback",
            f"add it to /etc/hosts, or set {variable}, to reach other hosts",
        )  # fmt: skip
    holders = [name for name, address in addresses.items() if address in addressed]
    if holders:
        return Finding("network", OK, f"{holders[0]} ({addresses[holders[0]]}), the address of {host}")
    if any(address.startswith("127.") or address == "::1" for address in addressed):
        return Finding("network", OK, f"the loopback, the address of {host}; for several hosts set {variable}")
    said = f"{host} is {', '.join(sorted(addressed))}, which no interface of this host has; gloo takes the loopback"
    return Finding("network", WARN, said, f"mend /etc/hosts, or set {variable}, to reach other hosts")


def addresses_by_interface() -> dict[str, str]:
    """The IPv4 address of every interface that has one."""
    import fcntl

    addressed = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue
            addressed[name] = socket.inet_ntoa(answer[20:24])
    return addressed
