import pytest
import torch

from jobs.state.checkpoint_names import check_file


@pytest.mark.parametrize("is_archive", [True, False])
def test_files_of_torch_save(tmp_path, is_archive):
    path = tmp_path / "c.pt"
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=is_archive)
    check_file(path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="no PyTorch checkpoint"):
        check_file(path)
