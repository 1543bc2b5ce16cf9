"The benchmarks of curation and preference still run: at toy size, with goals of time and memory that cannot be missed. Goals of correctness stay"
import papermill
import pytest

TOY = {
    "bench_curation": dict(reps=1, m_score=2, size=64, groups=5, m=4, small=64, goal_scoring=0., goal_store=1e9),
    "bench_preference": dict(reps=1, switches=1, patch=32, pairs=2, chunk=2, goal_group={2: 0.}, goal_copies_time=1e9, goal_two_pass=0., goal_switch=0., goal_activations=1e9),
}

@pytest.mark.parametrize("name", TOY)
def test_benchmark(root, name, tmp_path):
    papermill.execute_notebook(root/"nbs"/f"{name}.ipynb", tmp_path/"out.ipynb", TOY[name] | dict(record_dir=str(tmp_path/"record")), cwd=root, progress_bar=False)
    assert (tmp_path/"record"/"metrics.parquet").exists()
