"""What a low-rank change is: its spectrum, its directions, how it stands to the base's weights and to other changes.

Pure functions: adapters go in (with the base's weights, read from disk, where they are needed) and small frozen
results come out. No model is built. The studies are those of section 7 of the LoRA paper (Hu et al. 2021), with two
slips of its text set right here:

    appendix G   prints φ = (1/p)(1 - d²); with its own definitions of d and φ it is φ = 1 - d²/p
    appendix G   speaks of the left singular vectors of A; A's input directions, used in section 7.2, are its right ones
"""

from deltaw.analyse.amplification import Amplification, amplification
from deltaw.analyse.budget import Share, by_kind, by_layer
from deltaw.analyse.findings import Finding, findings
from deltaw.analyse.intruders import Intruders, intruders
from deltaw.analyse.pairs import SitePair, compare_sites
from deltaw.analyse.spectrum import Directions, SiteSpectrum, decompose, site_spectrum
from deltaw.analyse.study import Analysis, analyse
from deltaw.analyse.subspace import grassmann_distance, random_similarity, subspace_similarity
from deltaw.analyse.weights import BaseWeights, open_weights

__all__ = [
    "Amplification", "Analysis", "BaseWeights", "Directions", "Finding", "Intruders", "Share", "SitePair",
    "SiteSpectrum", "amplification", "analyse", "by_kind", "by_layer", "compare_sites", "decompose", "findings",
    "grassmann_distance", "intruders", "open_weights", "random_similarity", "site_spectrum", "subspace_similarity",
]
