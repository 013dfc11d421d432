"""The dataset doctor: says what is odd about pictures and captions before a step is spent. It changes no file.

diagnosis     what an examination found: Finding and Diagnosis
examination   examine(): a Dataset -> its Diagnosis, every picture opened once; as_split() when it is split anew
pictures      the measures of one picture: fingerprint, blur, fine detail
duplicates    fingerprints -> pairs that are alike, and the groups they form
captions      what is wrong with one caption
vocabulary    what all captions have in common
"""

from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import Finding as Finding
from .examination import as_split as as_split
from .examination import examine as examine
