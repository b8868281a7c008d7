"""From a public data set's own download to a task folder, by the paper's patch rules.

`convert` does the common part (splits, writing, the rename at the end); one module for each family of data sets says
which patches there are. What is known of a download's layout, and where it was seen, stands in that module.
"""

from __future__ import annotations

from mtdp.converters.convert import Summary, convert

__all__ = ["Summary", "convert"]
