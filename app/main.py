"""Entry script of the dashboard: the pages and their order. Start it with `perfmodel app`."""

import streamlit as st

st.set_page_config(page_title="perfmodel", layout="wide")
st.navigation(
    [
        st.Page("views/overview.py", title="Overview", default=True),
        st.Page("views/trace.py", title="Trace", url_path="trace"),
        st.Page("views/accuracy.py", title="Predicted vs measured", url_path="accuracy"),
        st.Page("views/offload.py", title="Offload", url_path="offload"),
    ],
    position="top",
).run()
