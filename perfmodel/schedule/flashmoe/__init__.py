"""FlashMoE's published figures (arXiv 2506.04667) beside the schedules of this package: docs/flashmoe.md.

`study` has the latencies and the hypotheses with one number each, `figures` all else that is published; `page` and
`figures_page` write it down.
"""
