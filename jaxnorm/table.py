"""The table of all norms: the README prints it, the tests run over it, `jaxnorm compare` takes its names."""

import dataclasses
from collections.abc import Callable

from jaxnorm import tabular
from jaxnorm.norms import (
    basic,
    batch,
    conditional,
    cross_iteration,
    dynamic,
    evo,
    layer,
    mixed,
    response,
    sets,
    weights,
    whitening,
)


@dataclasses.dataclass(frozen=True)
class NormRow:
    """One norm: what it is called, what it averages, what it carries from step to step, where it is from.

    Example:
        >>> import jaxnorm as jn
        >>> row = jn.norms()["group"]
        >>> row.layout, row.over, row.function is jn.group_norm, row.paper
        ('n ... (g k)', '... k', True, 'Wu and He 2018')
    """

    name: str
    function: Callable
    module: str
    layout: str
    over: str
    features: str
    state: str
    paper: str


# name, module, layout, over, features, state, paper. The function is called like the module.
ROWS = """
batch                  | BatchNorm               | ... c       | ...   | c       | running    | Ioffe and Szegedy 2015
layer                  | LayerNorm               | ... c       | c     | c       | none       | Ba, Kiros, Hinton 2016
RMS                    | RMSNorm                 | ... c       | c     | c       | none       | Zhang and Sennrich 2019
instance               | InstanceNorm            | n ... c     | ...   | c       | none       | Ulyanov et al. 2016
group                  | GroupNorm               | n ... (g k) | ... k | (g k)   | none       | Wu and He 2018
ghost batch            | GhostBatchNorm          | (m n) ... c | n ... | c       | running    | Hoffer et al. 2017
batch renorm           | BatchRenorm             | ... c       | ...   | c       | running    | Ioffe 2017
split batch            | SplitBatchNorm          | ... c       | ...   | c       | sets       | Xie et al. 2020
frozen batch           | FrozenBatchNorm         | ... c       |       | c       | fixed      | He et al. 2017
streaming              | StreamingNorm           | ... c       | ...   | c       | running    | Liao et al. 2016
cross-iteration batch  | CrossIterationBatchNorm | ... c       | ...   | c       | history    | Yao et al. 2021
virtual batch          | VirtualBatchNorm        | n ... c     | ...   | c       | reference  | Salimans et al. 2016
adaptive instance      | AdaptiveInstanceNorm    | n ... c     | ...   | n c     | none       | Huang and Belongie 2017
adaptive layer         | AdaptiveLayerNorm       | n ... c     | c     | n c     | none       | Peebles and Xie 2023
FiLM                   | FiLM                    | n ... c     |       | n c     | none       | Perez et al. 2018
conditional batch      | ConditionalBatchNorm    | n ... c     | n ... | n c     | running    | Dumoulin et al. 2017
SPADE                  | SPADE                   | n ... c     | n ... | n ... c | running    | Park et al. 2019
partial RMS            | PartialRMSNorm          | ... c       | c     | c       | none       | Zhang and Sennrich 2019
scale                  | ScaleNorm               | ... c       | c     |         | none       | Nguyen and Salazar 2019
L2                     | L2Norm                  | ... c       | c     | c       | none       | Ranjan et al. 2017
QK                     | QKNorm                  | ... d       | d     | d       | none       | Henry et al. 2020
gated RMS              | GatedRMSNorm            | ... c       | c     | c       | none       | Dao and Gu 2024
add and norm           | AddNorm                 | ... c       | c     | c       | none       | Vaswani et al. 2017
positional             | PositionalNorm          | n ... c     | c     |         | none       | Li et al. 2019
dynamic tanh           | DynamicTanh             | ... c       |       | c       | none       | Zhu et al. 2025
dynamic erf            | DynamicErf              | ... c       |       | c       | none       | Chen et al. 2025
global response        | GlobalResponseNorm      | n ... c     | ...   | c       | none       | Woo et al. 2023
filter response        | FilterResponseNorm      | n ... c     | ...   | c       | none       | Singh and Krishnan 2020
local response         | LocalResponseNorm       | ... c       | c     |         | none       | Krizhevsky et al. 2012
EvoNorm B0             | EvoNormB0               | n ... c     | n ... | c       | running    | Liu et al. 2020
EvoNorm S0             | EvoNormS0               | n ... (g k) | ... k | (g k)   | none       | Liu et al. 2020
switchable             | SwitchableNorm          | n ... c     | n ... | c       | running    | Luo et al. 2019
batch-channel          | BatchChannelNorm        | n ... c     | n ... | c       | running    | Qiao et al. 2019
decorrelated batch     | DecorrelatedBatchNorm   | n ... c     | n ... | c       | covariance | Huang et al. 2018
iterative              | IterativeNorm           | n ... c     | n ... | c       | covariance | Huang et al. 2019
weight                 | WeightNorm              | ... o       | ...   | o       | none       | Salimans and Kingma 2016
weight standardization | WeightStandardization   | ... o       | ...   | o       | none       | Qiao et al. 2019
scaled weight standardization | ScaledWeightStandardization | ... o | ... | o | none | Brock et al. 2021
spectral               | SpectralNorm            | ... o       | ...   |         | direction  | Miyato et al. 2018
"""
FAMILIES = (basic, batch, sets, conditional, cross_iteration, dynamic, evo, layer, mixed, response, weights, whitening)
COLUMNS = ["name", "function", "module", "layout", "over", "features", "state", "paper"]


class Norms(tuple[NormRow, ...]):
    """All rows, in order. By name too: `jn.norms()["group"]`. Prints as a table.

    Example:
        >>> import jaxnorm as jn
        >>> len(jn.norms()) >= 35, "batch" in jn.norms().names
        (True, True)
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all norms."""
        return tuple(row.name for row in self)

    def __getitem__(self, key):
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key not in self.names:
            raise KeyError(f"no norm {key!r}. They are: {', '.join(self.names)}.")
        return super().__getitem__(self.names.index(key))

    def _cells(self) -> list[list[str]]:
        def text(value) -> str:
            return value if isinstance(value, str) else value.__name__

        return [[text(getattr(row, column)) for column in COLUMNS] for row in self]

    def __str__(self) -> str:
        return tabular.plain(COLUMNS, self._cells())

    def markdown(self) -> str:
        """The table of the README."""
        rows = [
            [name, *(f"`{cell}`" if cell else "" for cell in code), state, paper]
            for name, *code, state, paper in self._cells()
        ]
        return tabular.markdown(COLUMNS, rows)

    def _repr_html_(self) -> str:
        return tabular.page(COLUMNS, self._cells())


def norms() -> Norms:
    """Every norm there is, one row each.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias:   which elements share a mean, which a scale

    Args:
        None. `layout` and `over` are the function's defaults or, where it splits an axis, what comes of it. An empty
        `over` is no statistics.

    Returns:
        Norms: a tuple of NormRow that prints as a table.

    Raises:
        KeyError: from `norms()[name]`, when there is none of that name.

    Example:
        >>> import jaxnorm as jn
        >>> for row in jn.norms()[:5]:
        ...     print(row.name, "|", row.layout, "|", row.over, "|", row.features, "|", row.state)
        batch | ... c | ... | c | running
        layer | ... c | c | c | none
        RMS | ... c | c | c | none
        instance | n ... c | ... | c | none
        group | n ... (g k) | ... k | (g k) | none
        >>> len(jn.norms())
        39

    Source: the papers in its last column.

    Differs from: Flax and torch have no list.
    """
    functions = {name.replace("_", ""): f for family in FAMILIES for name, f in vars(family).items() if callable(f)}
    rows = ([cell.strip() for cell in line.split("|")] for line in ROWS.strip().splitlines())
    return Norms(NormRow(name, functions[module.lower()], module, *rest) for name, module, *rest in rows)
