"""Makes the folders that checkpoints are written to."""

from pathlib import Path


def new_folder(path: str | Path) -> Path:
    """
    Makes a folder, so that what is written to it will be all that it holds. An empty folder may exist already.

    Raises:
        FileExistsError: `path` is a file, or a folder that holds files.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"The output folder {folder} is not empty. Name a new folder, or empty this one.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
