"""The kinds of adapters: what is trained of each, what it adds to a layer, and how a file says it.

    lora   W + s B A                              Hu et al. 2021
    dora   m (W + s B A) / |W + s B A|            Liu et al. 2024
    loha   W + s (B1 A1) * (B2 A2)                Hyeon-Woo et al. 2022
    lokr   W + s C (x) (B A)                      Yeh et al. 2024
    oft    R W, R orthogonal, block by block      Qiu et al. 2023

peft says which tensors there are and how they begin, wherever its mathematics is what ComfyUI's loader applies to a
file. Where the two differ, the loader's form is trained, so that a file always does what its training did.
"""

from ..config import DORA, LOHA, LOKR, LORA, OFT
from .dora import Dora
from .kind import Kind, Thinned
from .loha import Loha
from .lokr import Lokr
from .lora import Lora
from .oft import Oft

KINDS: dict[str, Kind] = {LORA: Lora(), DORA: Dora(), LOHA: Loha(), LOKR: Lokr(), OFT: Oft()}

__all__ = ["KINDS", "Kind", "Thinned"]
