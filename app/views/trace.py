"""Trace: upload a profile, see coverage, launch metrics, busy time and kernel classes."""

import frame
import uploads

from perfmodel import figures, report, text

frame.header("Trace", "Where does the time of a trace go, and what could not be joined?")
for one in uploads.choose("trace-upload"):
    metrics = one.analysis.metrics
    frame.literal(f"{one.name}: {metrics.source} trace, {text.count(metrics.n_events)} events")
    frame.numbers(
        {
            "TKLQT": text.ns(metrics.tklqt_ns),
            "Average kernel": text.ns(metrics.akd_ns),
            "GPU idle": text.frac(metrics.gpu_idle_frac),
            "Kernels": text.count(metrics.n_kernels),
        },
        {"TKLQT": "Sum of kernel start minus launch-call start; not wall time."},
    )
    frame.literal(report.findings_text(one.analysis.findings))
    if metrics.n_kernels:
        frame.chart(figures.busy(metrics), "Busy and idle time of each device")
        frame.rows(one.analysis.kernels, "Kernels, costliest first")
    frame.computed(["perfmodel", "analyze", one.name], report.trace_page(one.analysis, one.name))
