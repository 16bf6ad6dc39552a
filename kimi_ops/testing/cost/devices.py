"""Rates of the GPUs that costs are modelled for: one figure, one source, one kind.

Kinds of figures: "vendor", NVIDIA's specifications; "measured" by others, read for this table;
"recalled", quoted from the source named without reading it again; "fitted" to published times of
kernels; "assumed" where nothing published was found. A cost lists the assumed ones.

Sources: [A100] NVIDIA A100 Tensor Core GPU Architecture whitepaper; [H100] the same of H100;
[H200] H200 datasheet; [B200] NVIDIA Blackwell datasheet; [Ada] NVIDIA Ada GPU Architecture
whitepaper; [RTX] NVIDIA RTX Blackwell GPU Architecture whitepaper; [guide] CUDA C++ Programming
Guide, "Throughput of Native Arithmetic Instructions"; [Luo] Luo et al., arXiv 2402.13499 and
2501.12084; [Jarmusch] Jarmusch et al., arXiv 2507.10789, on an RTX 5080; [benches]
te42kyfo/gpu-benches on GitHub, results under gpu-l2-cache and gpu-latency; [c&c]
chipsandcheese.com, H100 2023-07 and B200 2025; [VeOmni] ByteDance-Seed/VeOmni pull request 986;
[fit] vLLM issue 13321, Triton WNA16 on A100.
"""

from __future__ import annotations

from dataclasses import dataclass, field

VENDOR, MEASURED, RECALLED = "vendor", "measured", "recalled"
FITTED, ASSUMED = "fitted", "assumed"


@dataclass(frozen=True)
class Figure:
    """A number with where it is from.

    Attributes:
        value: in the unit that the field of `Rates` states.
        kind: as in the module's docstring.
        source: short form of it.
    """

    value: float
    kind: str
    source: str


@dataclass(frozen=True)
class Rates:
    """What one GPU can do at best. "Per clock" is per SM and clock.

    Attributes:
        name: of the product.
        arch: whose static limits hold (`kimi_ops.testing.devices`).
        sms, clock: SMs, Hz.
        dram, l2: bytes per second of the chip.
        l2_port: bytes per clock from L2 to one SM.
        shared: wavefronts of 128 bytes per clock, of shared memory and L1 together.
        l1_tags: lines of 128 bytes per clock.
        issue: warp instructions per clock.
        fp32, int32, special, load_store: lanes per clock.
        l1_latency, l2_latency, dram_latency: clocks of a load that hits there, nothing else going
            on.
        tensor: kind as in `kimi_ops.testing.ptx.counters.tensor_kind` -> dense multiply-adds per
            clock; a kind that is absent has no published rate.
    """

    name: str
    arch: str
    sms: Figure
    clock: Figure
    dram: Figure
    l2: Figure
    fp32: Figure
    int32: Figure
    load_store: Figure
    l1_latency: Figure
    l2_latency: Figure
    dram_latency: Figure
    l2_port: Figure = Figure(64, RECALLED, "[Luo]")
    shared: Figure = Figure(1, VENDOR, "[guide]: 32 banks of 4 bytes")
    l1_tags: Figure = Figure(4, FITTED, "[fit]; one line per clock was refuted")
    issue: Figure = Figure(4, VENDOR, "whitepapers: 4 schedulers, one instruction each")
    special: Figure = Figure(16, RECALLED, "[guide]")
    tensor: dict[str, Figure] = field(default_factory=dict)

    def figures(self) -> dict[str, Figure]:
        """All figures but those of the tensor cores, by field."""
        return {n: v for n, v in vars(self).items() if isinstance(v, Figure)}


def _tensor(
    instruction: str, half: float, kind: str, source: str, *, half_to_half: float = 1
) -> dict[str, Figure]:
    """Rates of all types from that of 16-bit ones: TF32 at half of it, bytes at twice."""
    factors = {
        "bf16.f32": 1,
        "f16.f32": 1,
        "f16.f16": half_to_half,
        "tf32.f32": 1 / 2,
        "s8.s32": 2,
        "u8.s32": 2,
    }
    return {
        f"{instruction} {types}": Figure(half * factor, kind, source)
        for types, factor in factors.items()
    }


_GUIDE_64, _GUIDE_128 = Figure(64, RECALLED, "[guide]"), Figure(128, RECALLED, "[guide]")
_HOPPER_TENSOR = {
    # 989.4 TFLOP/s = 132 SMs * 2 * 2048 * 1.83 GHz.
    **_tensor("wgmma", 2048, VENDOR, "[H100]"),
    **_tensor("mma.sync", 0.629 * 2048, RECALLED, "[Luo]: 62.9 % of wgmma on average"),
}
_HOPPER_LATENCIES = tuple(
    Figure(cycles, MEASURED, "[benches] h100_pcie.txt at 1.755 GHz") for cycles in (34, 266, 650)
)
_ADA_LATENCIES = tuple(
    Figure(cycles, MEASURED, "[benches] l40.txt, the same chip") for cycles in (36, 277, 631)
)


def _hopper(name: str, dram: Figure) -> Rates:
    l1, l2, far = _HOPPER_LATENCIES
    return Rates(
        name=name,
        arch="sm_90a",
        sms=Figure(132, VENDOR, "[H100]"),
        # The largest is 1.98; 1.395 to 1.755 were seen under load, so this is between.
        clock=Figure(1.755e9, MEASURED, "[c&c], of an H100 PCIe"),
        dram=dram,
        l2=Figure(9.7e12, MEASURED, "[benches] h200.txt, 12 to 40 MB"),
        fp32=_GUIDE_128,
        int32=_GUIDE_64,
        load_store=Figure(32, RECALLED, "[H100]"),
        l1_latency=l1,
        l2_latency=l2,
        dram_latency=far,
        tensor=_HOPPER_TENSOR,
    )


RATES = {
    rates.name: rates
    for rates in (
        Rates(
            name="A100",
            arch="sm_80",
            sms=Figure(108, VENDOR, "[A100]"),
            clock=Figure(1.41e9, VENDOR, "[A100]"),
            dram=Figure(2.039e12, VENDOR, "[A100], 80 GB SXM"),
            l2=Figure(5.4e12, MEASURED, "[benches] a100_80.txt, up to 25 MB"),
            fp32=_GUIDE_64,
            int32=_GUIDE_64,
            load_store=Figure(32, RECALLED, "[A100]"),
            l1_latency=Figure(38, RECALLED, "[Luo]"),
            l2_latency=Figure(261, RECALLED, "[Luo]"),
            dram_latency=Figure(466, RECALLED, "[Luo]"),
            # 312 TFLOP/s = 108 SMs * 2 * 1024 * 1.41 GHz.
            tensor=_tensor("mma.sync", 1024, VENDOR, "[A100]"),
        ),
        _hopper("H100", Figure(3.35e12, VENDOR, "[H100], SXM")),
        _hopper("H200", Figure(4.8e12, VENDOR, "[H200]")),
        Rates(
            name="B200",
            arch="sm_100a",
            sms=Figure(148, MEASURED, "[c&c]"),
            clock=Figure(1.965e9, MEASURED, "[VeOmni]"),
            dram=Figure(7.7e12, VENDOR, "[B200]"),
            l2=Figure(10.8e12, ASSUMED, "H200's bytes per SM and clock"),
            fp32=_GUIDE_128,
            int32=_GUIDE_64,
            load_store=Figure(32, ASSUMED, "as H100"),
            l1_latency=Figure(39, MEASURED, "[c&c]"),
            l2_latency=Figure(295, MEASURED, "[c&c]: 150 ns on the near die"),
            dram_latency=Figure(728, ASSUMED, "H100's 370 ns"),
            # No published rate of mma.sync; tcgen05 is what its peak is for.
        ),
        Rates(
            name="RTX 4090",
            arch="sm_89",
            sms=Figure(128, VENDOR, "[Ada]"),
            clock=Figure(2.52e9, VENDOR, "[Ada]"),
            dram=Figure(1.008e12, VENDOR, "[Ada]"),
            l2=Figure(5.2e12, MEASURED, "[benches] l40.txt, the same chip"),
            fp32=_GUIDE_128,
            int32=_GUIDE_64,
            load_store=Figure(16, RECALLED, "[Ada]"),
            l1_latency=_ADA_LATENCIES[0],
            l2_latency=_ADA_LATENCIES[1],
            dram_latency=_ADA_LATENCIES[2],
            # 165.2 TFLOP/s = 128 SMs * 2 * 256 * 2.52 GHz.
            tensor=_tensor("mma.sync", 256, RECALLED, "[Ada]", half_to_half=2)
            | {f"mma.sync {t}": Figure(1024, RECALLED, "[Ada]") for t in ("s8.s32", "u8.s32")},
        ),
        Rates(
            name="RTX 5090",
            arch="sm_120",
            sms=Figure(170, VENDOR, "[RTX]"),
            clock=Figure(2.407e9, VENDOR, "[RTX]"),
            dram=Figure(1.792e12, VENDOR, "[RTX]"),
            l2=Figure(6.0e12, ASSUMED, "L40's bytes per SM and clock"),
            fp32=_GUIDE_128,
            int32=Figure(128, RECALLED, "[RTX]"),
            load_store=Figure(16, ASSUMED, "as RTX 4090"),
            l1_latency=Figure(36, ASSUMED, "as RTX 4090"),
            l2_latency=Figure(358, RECALLED, "[Jarmusch]"),
            dram_latency=Figure(877, RECALLED, "[Jarmusch]"),
            # 209.5 TFLOP/s = 170 SMs * 2 * 256 * 2.407 GHz.
            tensor=_tensor("mma.sync", 256, RECALLED, "[RTX]", half_to_half=2)
            | {f"mma.sync {t}": Figure(1024, RECALLED, "[RTX]") for t in ("s8.s32", "u8.s32")},
        ),
    )
}


def rates_of(device: str | Rates) -> Rates:
    """The rates of a GPU by name, ``A100``, ``rtx 4090``; those given are returned.

    Raises:
        ValueError: a GPU that is not in the table.
    """
    if isinstance(device, Rates):
        return device
    for name, rates in RATES.items():
        if name.lower() == device.lower():
            return rates
    raise ValueError(f"no rates for {device!r}; there are {', '.join(RATES)}")


@dataclass(frozen=True)
class Latencies:
    """Clocks from the issue of an instruction to the first that may use its result.

    Those of arithmetic are of Ampere and Hopper ([Luo] and the microbenchmarks it cites, recalled)
    and taken for all; ``synchronise`` is assumed.

    Attributes:
        integer, floating, convert, special, divide, shuffle: arithmetic and shuffles.
        shared: loads from shared memory.
        mma, wgmma: matrix instructions; wgmma's beyond the time of its multiply-adds.
        store: until a store is out of the warp's way.
        synchronise: a barrier or a wait, beyond what it waits for.
        launch: from the start of the CTA to its first instruction, and from its last to the next
            CTA.
    """

    integer: float = 5
    floating: float = 5
    convert: float = 6
    special: float = 20
    divide: float = 60
    shuffle: float = 24
    shared: float = 30
    mma: float = 33
    wgmma: float = 32
    store: float = 10
    synchronise: float = 30
    launch: float = 200
