"""What of a datasheet a machine delivers. A spec is never fitted, a profile never typed by hand."""

from dataclasses import dataclass, field, fields, replace

from sim.access import AccessProfile, at_tokens, measured_access
from sim.attention import Selector
from sim.checks import require_non_negative, require_positive, require_share, require_whole
from sim.spec import DType, MachineSpec


def _share(nominal: float, reason: str) -> float:
    return field(default=nominal, metadata={"kind": "share", "reason": reason})


def _amount(nominal: float, reason: str) -> float:
    return field(default=nominal, metadata={"kind": "amount", "reason": reason})


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One kernel, transfer or step of the runtime, timed. ``case`` is ``key=value`` words that name it within its family.

    ``seconds`` is the median of ``samples``, ``low_s`` and ``high_s`` are their tenth and ninetieth percentiles;
    ``size_bytes`` and ``flops`` are what it moved and computed, for the rates that a reader wants; ``peak_bytes`` is the
    most that the device's allocator had given out meanwhile, 0 where it was not asked. ``launch_s`` is what the host took
    to launch a kernel just before and after, 0 where that was not looked at: hosts shared with others change their pace.
    """

    family: str
    case: str
    seconds: float
    low_s: float
    high_s: float
    samples: int
    size_bytes: float = 0.0
    flops: float = 0.0
    peak_bytes: int = 0
    launch_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seconds", "low_s", "high_s"):
            require_positive(f"measurement {self.family}.{name}", getattr(self, name))
        require_whole(f"measurement {self.family}.samples", self.samples)

    def text(self, name: str) -> str:
        """The value of ``name`` in the case."""
        return dict(word.split("=", 1) for word in self.case.split())[name]

    def number(self, name: str) -> int:
        """The same where it is a whole number."""
        return int(self.text(name))

    def at(self, name: str, value: int) -> "Measurement":
        """The case with another ``name``, to ask what it would take; the seconds stay those of this one."""
        words = (word.split("=", 1) for word in self.case.split())
        return replace(self, case=" ".join(f"{one}={value if one == name else said}" for one, said in words))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The machine that was measured. ``gpu`` is the catalogue's name of the card, or that of a machine without one."""

    gpu: str
    device: str
    cpu: str
    cores: int
    driver: str
    torch: str
    clocks: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A 95 % interval of one constant and what it rests on; no interval where the data leave its nominal value standing."""

    parameter: str
    low: float | None
    high: float | None
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyError:
    """How far the fitted cost model is from the measurements of one family, as shares of what was measured."""

    family: str
    measurements: int
    median: float
    worst: float
    worst_case: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a measured profile rests on. ``machine`` is there where the catalogue does not know it (a CPU).

    ``access`` are selectors' profiles from runs of a checkpoint; the others' are ``sim.access``'. ``random_access`` are
    those of random weights, whose attention is spread more evenly: for plans that are run with such. ``reference`` is a
    decode step that is measured again before plans are held against the profile: is the machine what it was? ``launch_s``
    is what the host took to launch a kernel when what waits for it was measured, 0 if that is not known.
    """

    fingerprint: Fingerprint
    machine: MachineSpec | None = None
    estimates: tuple[Estimate, ...] = ()
    errors: tuple[FamilyError, ...] = ()
    access: tuple[AccessProfile, ...] = ()
    random_access: tuple[AccessProfile, ...] = ()
    reference: Measurement | None = None
    launch_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredProduct:
    """[rows, inputs] x [inputs, outputs] as measured, by ascending rows."""

    inputs: int
    outputs: int
    dtype: DType
    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        name = f"product of {self.inputs} x {self.outputs}"
        if not len(self.rows) == len(self.seconds) >= 1:
            raise ValueError(
                f"{name}: {len(self.rows)} rows, {len(self.seconds)} seconds: must be as many, at least one"
            )
        if list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ValueError(f"{name}: rows={self.rows}, must ascend from at least 1")
        for seconds in self.seconds:
            require_positive(f"{name}: seconds", seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Constants of the cost model. ``basis`` says what they rest on: nominal, or measured on which card and date.

    ``evidence`` changes no price, so profiles that differ in it alone are equal.
    """

    name: str
    basis: str
    evidence: Evidence | None = field(default=None, compare=False)
    products: tuple[MeasuredProduct, ...] = ()  # of matrices that need no curve by rows
    gemm_hbm_efficiency: float = _share(
        0.85, "weight streaming of a tuned decode GEMM reaches 80 to 90 % of datasheet HBM bandwidth"
    )
    gemm_peak_efficiency: float = _share(0.78, "large square GEMMs on random data: 769 of 990 TFLOP/s on an H200")
    gemm_half_rows: float = _amount(
        8,
        "rows that cost as much again as the work itself: rate(rows) = peak * rows / (rows + half), Hockney's n-half; what few "
        "rows take is the streaming of the weights",
    )
    gemm_sustained_share: float = _share(
        1.0, "of that rate, what a card's power limit leaves to products that go on for seconds"
    )
    other_power_share: float = _share(
        0.9,
        "of what products may draw then, what the rest of a step draws: where products are 70 % of an H100's step, clocks fall",
    )
    prefill_sustained_share: float = _share(
        1.0,
        "of that rate, what it leaves to a prefill's products once clocks have fallen: what runs between them draws less",
    )
    product_setup_s: float = _amount(
        0.0, "ramp and tail of one matrix product; nominally among the launches of kernels_per_layer (6 us on an H200)"
    )
    attention_efficiency: float = _share(0.80, "share of HBM bandwidth that decode attention reads KV with")
    attention_setup_s: float = _amount(
        0.0, "ramp and tail of decode attention; nominally among the launches of kernels_per_layer"
    )
    attention_token_s: float = _amount(
        0.0, "of 128 channels: a head's attention goes over its tokens one block after the other, however few sequences"
    )
    quantised_attention_efficiency: float = _share(0.60, "the same share where keys and values are widened on the way")
    quantised_token_s: float = _amount(0.0, "the same turn of a token where it is widened")
    paged_token_s: float = _amount(0.0, "what such a turn takes more where tokens lie in pages that a table lists")
    streamed_token_s: float = _amount(
        0.02e-6,
        "the same where they lie in slots and in what has come over the link: 53 us for 530 tokens on an H200, not 43",
    )
    paged_again_share: float = _share(
        0.30, "of a page's first reading, what it takes again for each further query head that shares its keys"
    )
    prefill_attention_efficiency: float = _share(0.50, "share of the matrix rate that causal attention reaches")
    prompt_tile_s: float = _amount(
        3.3e-6,
        "least that a multiprocessor takes for 64 queries of a head of 128 channels: 25 ns on an H200's 132, of 16 to 512 tokens",
    )
    gather_efficiency: float = _share(
        0.60, "rows of 1 KiB and more gathered in HBM, bytes read plus written: 3.1 of 4.8 TB/s on an H200"
    )
    elementwise_efficiency: float = _share(
        0.80, "share of HBM bandwidth of a prefill's passes between its products: sums, copies, ReLU"
    )
    norm_efficiency: float = _share(0.55, "the same of norms, rotations and gates, which do more than read and write")
    conversion_efficiency: float = _share(
        0.60, "share of HBM bandwidth of rounding KV to fewer bits, bytes read plus written"
    )
    widening_efficiency: float = _share(0.60, "the same of widening it again")
    weight_widening_efficiency: float = _share(
        0.60, "the same of a matrix that a captured step widens before its product, by one kernel"
    )
    widened_found_bytes: float = _amount(
        20e6,
        "a matrix so large, just widened, its product finds in the GPU's cache, of one twice as large nothing: OPT-1.3B's, of 8 to "
        "34 MB, take an H200 with 50 MB of cache 15 us a layer less than from HBM",
    )
    selection_efficiency: float = _share(0.60, "share of HBM bandwidth of the passes of a decode step's selection")
    selection_exposed_share: float = _share(
        1.0,
        "of a captured step's choice for the next one, what the step feels, were there hardly any sequences: it runs on a "
        "branch beside the products, on as many multiprocessors as there are sequences",
    )
    link_efficiency: float = _share(
        0.86, "large pinned copies: 54.6 of 63.0 GB/s on PCIe 5 x16; the rest is packet overhead"
    )
    link_duplex_efficiency: float = _share(0.88, "rate that each direction keeps while both run: 48.0 of 54.6 GB/s")
    gather_link_efficiency: float = _share(
        0.92, "gather kernel reading pinned rows, against a large copy: 50 of 54.6 GB/s"
    )
    copy_setup_s: float = _amount(8e-6, "start of one copy: 1 MiB took 27.5 us where its bytes take 19.2")
    copy_floor_s: float = _amount(10e-6, "no copy ends sooner, however small (16 to 18 us when launched eagerly)")
    copy_handover_s: float = _amount(
        10e-6, "between two copies that each wait for what other streams do: 2 to 27 us on an H200, evenly"
    )
    gather_setup_s: float = _amount(5e-6, "start of a gather kernel and the first round trip over the link")
    gather_sm_share: float = _share(0.06, "8 of 132 SMs hold the persistent blocks that keep a PCIe 5 link busy")
    kernels_per_layer: float = _amount(
        10, "kernels of a fused decoder layer: norms, projections, rotation, attention, feed-forward"
    )
    kernels_per_selection: float = _amount(4, "score, reduce, top-k, update of the selection")
    selection_pass_s: float = _amount(
        0.0, "of a captured step's choice for the next one, a pass over the weights of sixteen heads or past queries"
    )
    recall_setup_s: float = _amount(
        0.0, "of a captured step's scores and choice among pages, besides the launches of kernels_per_selection"
    )
    recall_doubling_s: float = _amount(
        0.0, "of that choice, what each doubling of a sequence's tokens beyond 512 adds, however few sequences"
    )
    host_operation_s: float = _amount(
        0.0, "the host's time to launch one operation of a layer by itself; nominally it keeps ahead of the GPU"
    )
    step_overhead_s: float = _amount(60e-6, "graph launch, sampling and the read-back of a step's tokens")
    piece_setup_s: float = _amount(
        15e-6,
        "between two graphs of a step that is replayed in pieces: 14 to 17 us on an H200, whatever is copied meanwhile",
    )
    branch_s: float = _amount(
        37e-6,
        "of a step whose choices run on a branch beside it, once: 36 to 40 us on an H200, whatever layers and sequences",
    )
    host_attention_efficiency: float = _share(0.50, "share of DRAM bandwidth that CPU attention reads KV with")
    host_round_trip_s: float = _amount(30e-6, "queries to the CPU and the result back, each layer")
    library_bytes: float = _amount(
        2**25, "HBM that libraries keep of the allocator's for each stream that multiplies matrices"
    )
    reserve_bytes: float = _amount(2**30, "CUDA context, libraries' workspaces and allocator slack")

    def __post_init__(self) -> None:
        for parameter in fields(self):
            value = getattr(self, parameter.name)
            if parameter.metadata.get("kind") == "share":
                require_share(f"profile.{parameter.name}", value)
                if not parameter.name.endswith("sm_share"):
                    require_positive(f"profile.{parameter.name}", value)
            elif parameter.metadata.get("kind") == "amount":
                require_non_negative(f"profile.{parameter.name}", value)

    @classmethod
    def nominal(cls, machine: MachineSpec) -> "Profile":
        """Constants that hold for the class of machine, each with its reason; none is tuned to one paper's figure."""
        return cls(
            name=f"nominal-{machine.name}",
            basis="nominal: datasheet rates times typical efficiencies, nothing measured here",
        )

    def access(self, selector: Selector) -> AccessProfile:
        """How ``selector``'s picks behave: as measured with this profile, else as ``sim.access`` has it."""
        own = () if self.evidence is None else self.evidence.access
        return next((one for one in own if one.selector is selector), None) or measured_access(selector)

    def random_access(self, selector: Selector, model: str, tokens: int) -> AccessProfile:
        """The same on random weights of ``model``, whose later layers attend more evenly, over about so many cached ``tokens`` of
        a sequence; else of the model measured first.
        """
        own = () if self.evidence is None else self.evidence.random_access
        found = [one for one in own if one.selector is selector]
        names = [one.model for one in found]
        if not found:
            return measured_access(selector)
        nearest = model if model in names else names[0]
        return at_tokens([one for one in found if one.model == nearest], tokens)

    @classmethod
    def constants(cls) -> dict[str, str]:
        """Every constant and its kind: a share, or an amount."""
        return {member.name: member.metadata["kind"] for member in fields(cls) if "kind" in member.metadata}

    @classmethod
    def reasons(cls) -> dict[str, str]:
        """Why each constant has its nominal value."""
        return {
            parameter.name: parameter.metadata["reason"] for parameter in fields(cls) if "reason" in parameter.metadata
        }
