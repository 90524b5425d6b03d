//! A Hugging Face directory of safetensors.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::companion::read_companions;
use super::folder::Folder;
use super::header::{SafetensorsFile, StoredTensor};
use super::index::{INDEX_FILE, Index, SINGLE_FILE};
use super::{Checkpoint, CheckpointError, TensorHeader};
use crate::store::BlobStore;

const CONFIG_FILE: &str = "config.json";

/// A directory with `config.json` and `model.safetensors`, or shards and their index. If both are there, the single file
/// counts, as in transformers. Tensors that the index does not list are not part of the checkpoint.
#[derive(Debug)]
pub struct SafetensorsCheckpoint {
    path: PathBuf,
    folder: Folder,
    config: serde_json::Value,
    files: Vec<SafetensorsFile>,
    /// Of every tensor, floats or not: its file and its place there.
    places: BTreeMap<String, (usize, usize)>,
}

impl SafetensorsCheckpoint {
    /// Opens a directory: reads the config and all headers.
    ///
    /// # Errors
    /// Whatever is wrong with the files, see [`CheckpointError`].
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        Self::open_in(Folder::Disk(directory.to_owned()))
    }

    /// Opens what is below a prefix in a bucket, as [`Self::open`] does a directory; tensors are read by range.
    ///
    /// # Errors
    /// As [`Self::open`]; what the store says.
    pub fn open_in_store(store: Arc<dyn BlobStore>) -> Result<Self, CheckpointError> {
        Self::open_in(Folder::Store(store))
    }

    fn open_in(folder: Folder) -> Result<Self, CheckpointError> {
        let config = read_config(&folder)?;
        let (files, index) = if folder.has(SINGLE_FILE)? {
            (vec![SafetensorsFile::open(&folder, SINGLE_FILE)?], None)
        } else if folder.has(INDEX_FILE)? {
            let index = Index::read(&folder)?;
            let shards: BTreeSet<&String> = index.weight_map.values().collect();
            let open = |shard: &&String| SafetensorsFile::open(&folder, shard);
            (shards.iter().map(open).collect::<Result<_, _>>()?, Some(index))
        } else {
            return Err(CheckpointError::NotACheckpoint { path: folder.path() });
        };
        let places = match index {
            None => places_in(0, &files[0]).collect(),
            Some(index) => {
                let by_file: BTreeMap<_, _> = files
                    .iter()
                    .enumerate()
                    .map(|(number, file)| (&file.path, places_in(number, file).collect()))
                    .collect();
                place_indexed(&folder, index, &by_file)?
            }
        };
        Ok(Self { path: folder.path(), folder, config, files, places })
    }

    fn stored(&self, name: &str) -> Option<(&SafetensorsFile, &StoredTensor)> {
        let &(file, tensor) = self.places.get(name)?;
        let file = &self.files[file];
        Some((file, &file.tensors[tensor]))
    }

    fn stored_floats(&self, name: &str) -> Result<(&SafetensorsFile, &StoredTensor, &TensorHeader), CheckpointError> {
        let (file, stored) = self
            .stored(name)
            .ok_or_else(|| CheckpointError::MissingTensor { path: self.path.clone(), tensor: name.to_owned() })?;
        let header = stored.header.as_ref().ok_or_else(|| CheckpointError::UnsupportedDtype {
            path: file.path.clone(),
            tensor: name.to_owned(),
            dtype: stored.dtype.clone(),
        })?;
        Ok((file, stored, header))
    }

    fn names_where(&self, wanted: impl Fn(&StoredTensor) -> bool) -> Vec<&str> {
        let listed = |file: usize, place: usize, name: &str| self.places.get(name) == Some(&(file, place));
        let mut names = Vec::new();
        for (number, file) in self.files.iter().enumerate() {
            for (place, tensor) in file.tensors.iter().enumerate() {
                if wanted(tensor) && listed(number, place, &tensor.name) {
                    names.push(tensor.name.as_str());
                }
            }
        }
        names
    }
}

fn read_config(folder: &Folder) -> Result<serde_json::Value, CheckpointError> {
    let config: serde_json::Value = folder.read_json(CONFIG_FILE)?;
    if config.is_object() {
        return Ok(config);
    }
    Err(CheckpointError::InvalidKey {
        path: folder.file(CONFIG_FILE),
        key: "(root)".to_owned(),
        problem: "is not an object",
    })
}

fn places_in(number: usize, file: &SafetensorsFile) -> impl Iterator<Item = (String, (usize, usize))> + '_ {
    file.tensors.iter().enumerate().map(move |(place, tensor)| (tensor.name.clone(), (number, place)))
}

type Places = BTreeMap<String, (usize, usize)>;

fn place_indexed(
    folder: &Folder,
    index: Index,
    by_file: &BTreeMap<&PathBuf, Places>,
) -> Result<Places, CheckpointError> {
    let mut places = BTreeMap::new();
    for (tensor, shard) in index.weight_map {
        let path = folder.file(&shard);
        match by_file.get(&path).and_then(|file| file.get(&tensor)) {
            Some(&place) => places.insert(tensor, place),
            None => return Err(CheckpointError::MissingTensor { path, tensor }),
        };
    }
    Ok(places)
}

/// The bytes that rows `rows` of a row-major tensor take within it.
pub(super) fn row_bytes(
    path: &Path,
    tensor: &str,
    header: &TensorHeader,
    rows: &Range<usize>,
) -> Result<Range<usize>, CheckpointError> {
    match header.shape.split_first() {
        Some((&count, inner)) if rows.start <= rows.end && rows.end <= count => {
            let row = inner.iter().product::<usize>() * header.dtype.bytes();
            Ok(rows.start * row..rows.end * row)
        }
        _ => Err(CheckpointError::RowsOutOfRange {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            shape: header.shape.clone(),
            start: rows.start,
            end: rows.end,
        }),
    }
}

impl Checkpoint for SafetensorsCheckpoint {
    fn path(&self) -> &PathBuf {
        &self.path
    }

    fn file_of(&self, name: &str) -> &Path {
        self.stored(name).map_or(&self.path, |(file, _)| &file.path)
    }

    fn config(&self) -> &serde_json::Value {
        &self.config
    }

    fn names(&self) -> Vec<&str> {
        self.names_where(|tensor| tensor.header.is_some())
    }

    fn other_names(&self) -> Vec<&str> {
        self.names_where(|tensor| tensor.header.is_none())
    }

    fn header(&self, name: &str) -> Option<&TensorHeader> {
        self.stored(name)?.1.header.as_ref()
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let (file, stored, header) = self.stored_floats(name)?;
        file.read(stored.start, header.bytes())
    }

    fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<u8>, CheckpointError> {
        let (file, stored, header) = self.stored_floats(name)?;
        let bytes = row_bytes(&file.path, name, header, &rows)?;
        file.read(stored.start + bytes.start as u64, bytes.len())
    }

    fn config_file(&self) -> Result<Option<Vec<u8>>, CheckpointError> {
        self.folder.read_whole(CONFIG_FILE).map(Some)
    }

    fn companion_files(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        read_companions(&self.folder)
    }
}
