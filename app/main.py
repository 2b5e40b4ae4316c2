"""The dashboard's pages and their order; `serve.py` serves it, `perfmodel app` starts that."""

import link
import streamlit as st

page = st.navigation(
    [
        st.Page("views/overview.py", title="Overview", default=True),
        st.Page("views/trace.py", title="Trace", url_path="trace"),
        st.Page("views/roofline.py", title="Roofline", url_path="roofline"),
        st.Page("views/accuracy.py", title="Predicted vs measured", url_path="accuracy"),
        st.Page("views/placement.py", title="Placement", url_path="placement"),
        st.Page("views/schedules.py", title="Schedules", url_path="schedules"),
        st.Page("views/regression.py", title="Regression", url_path="regression"),
    ],
    position="top",
)
st.set_page_config(page_title=f"{page.title} - perfmodel", layout="wide")
with link.honoured():
    page.run()
