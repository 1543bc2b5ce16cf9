"The benchmark that reaches deepest into the package still runs: at toy size, with goals of time that cannot be missed. Goals of correctness stay"
import papermill
import pytest


@pytest.mark.slow
def test_bench_curation(root, tmp_path):
    toy = dict(reps=1, m_score=2, size=64, groups=5, m=4, small=64, goal_scoring=0., goal_store=1e9, record_dir=str(tmp_path/"record"))
    papermill.execute_notebook(root/"nbs"/"bench_curation.ipynb", tmp_path/"out.ipynb", toy, cwd=root, progress_bar=False)
    assert (tmp_path/"record"/"metrics.parquet").exists()
