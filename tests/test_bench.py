"The benchmark that reaches deepest into the package runs at toy size; goals of time cannot be missed, others stay"
import papermill
import pytest


@pytest.mark.slow
def test_bench_curation(root, tmp_path):
    record = tmp_path/"record"
    toy = dict(reps=1, m_score=2, size=64, groups=5, m=4, small=64, goal_scoring=0., goal_store=1e9,
               record_dir=str(record))
    page = root/"nbs"/"bench_curation.ipynb"
    papermill.execute_notebook(page, tmp_path/"out.ipynb", toy, cwd=root, progress_bar=False)
    assert (record/"metrics.parquet").exists()
