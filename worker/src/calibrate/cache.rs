//! Hidden states in bounded memory: what exceeds the budget goes to one unlinked scratch file and comes back unseen.
//!
//! A worker with a GPU keeps them there first, then in host memory that is pinned, which the GPU copies from by itself, then
//! on disk. Whatever a tensor was put in as, it is loaded to the device that computes.
//!
//! Sequences are read in the order in which they were written, over and over. So the first ones stay in memory and later
//! ones go to disk: evicting the least recently used would evict each just before it is needed.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::{DType, Device, Tensor};
use espalier_common::fault::FaultClass;

use crate::device::memory::Pinned;

/// Sequences under way on a device at a time, as long as its memory lasts.
const MICRO_BATCH: usize = 8;

/// Why a tensor cannot be kept or read back.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The scratch file failed.
    #[error("scratch file in {}", folder.display())]
    Io {
        /// Folder of the scratch file.
        folder: PathBuf,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// The tensor library failed.
    #[error("tensor backend failed")]
    Backend(#[from] candle_core::Error),
}

impl CacheError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Io { .. } | Self::Backend(_) => FaultClass::RetryElsewhere,
        }
    }
}

/// Tensors in memory up to a budget, the rest on disk.
#[derive(Debug, Clone)]
pub struct ActivationCache {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// What computes.
    device: Device,
    device_budget_bytes: u64,
    budget_bytes: u64,
    folder: PathBuf,
    space: Mutex<Space>,
}

/// What is taken of memory and of the scratch file.
#[derive(Debug, Default)]
struct Space {
    /// On a device other than the CPU.
    device_bytes: u64,
    on_device: Vec<Weak<Slot>>,
    /// How often the device had no memory left.
    shortages: u32,
    seconds_making_room: f64,
    resident_bytes: u64,
    spilled_bytes: u64,
    file: Option<Arc<File>>,
    file_bytes: u64,
    /// Free extents of the file, by length: sequences of one stage are all of one length.
    free: BTreeMap<u64, Vec<u64>>,
}

/// One tensor in the cache, `[tokens, width]` f32. Clones share it; the last one to be dropped frees its space.
#[derive(Debug, Clone)]
pub struct Entry {
    slot: Arc<Slot>,
}

#[derive(Debug)]
struct Slot {
    shared: Arc<Shared>,
    rows: usize,
    columns: usize,
    place: Mutex<Place>,
}

#[derive(Debug)]
enum Place {
    /// On a device other than the CPU.
    Device(Tensor),
    /// Host memory that such a device copies from.
    Pinned(Pinned),
    Memory(Tensor),
    Disk {
        file: Arc<File>,
        offset: u64,
    },
}

impl ActivationCache {
    /// A cache of `budget_bytes` in memory, spilling to a file in `folder`, for the CPU.
    pub fn new(budget_bytes: u64, folder: PathBuf) -> Self {
        Self::on(Device::Cpu, 0, budget_bytes, folder)
    }

    /// A cache whose tensors are loaded to `device`, with `device_budget_bytes` there if it is not the CPU.
    pub fn on(device: Device, device_budget_bytes: u64, budget_bytes: u64, folder: PathBuf) -> Self {
        let space = Mutex::default();
        Self { shared: Arc::new(Shared { device, device_budget_bytes, budget_bytes, folder, space }) }
    }

    /// Sequences to have under way on the device at a time.
    pub fn micro_batch(&self) -> usize {
        MICRO_BATCH >> self.shared.space().shortages.min(MICRO_BATCH.ilog2())
    }

    /// Counts a shortage of memory on the device, and the seconds it took to make room; returns what [`Self::micro_batch`] is
    /// from now on.
    pub fn note_shortage(&self, seconds: f64) -> usize {
        let mut space = self.shared.space();
        space.shortages += 1;
        space.seconds_making_room += seconds;
        drop(space);
        self.micro_batch()
    }

    /// Shortages of memory on the device so far, and the seconds that making room took.
    pub fn shortages(&self) -> (u32, f64) {
        let space = self.shared.space();
        (space.shortages, space.seconds_making_room)
    }

    /// Where loaded tensors are.
    pub fn device(&self) -> &Device {
        &self.shared.device
    }

    /// Keeps a matrix `[tokens, width]` f32.
    ///
    /// # Errors
    /// `Io` if it has to go to disk and cannot; `Backend` if it is no f32 matrix.
    pub fn put(&self, tensor: Tensor) -> Result<Entry, CacheError> {
        let (rows, columns) = tensor.dims2()?;
        let bytes = (rows * columns * DType::F32.size_in_bytes()) as u64;
        let stays = !tensor.device().is_cpu() && self.shared.reserve_on_device(bytes);
        let place = if stays { Place::Device(tensor) } else { self.shared.place_on_host(tensor, bytes)? };
        let slot = Arc::new(Slot { shared: Arc::clone(&self.shared), rows, columns, place: Mutex::new(place) });
        if stays {
            self.shared.space().on_device.push(Arc::downgrade(&slot));
        }
        Ok(Entry { slot })
    }

    /// Bytes held in memory and on disk.
    pub fn held_bytes(&self) -> (u64, u64) {
        let space = self.shared.space();
        (space.resident_bytes, space.spilled_bytes)
    }

    /// Moves half of what is on the device to the host, oldest first, because the device has no memory left. Returns the bytes
    /// that were moved.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn make_room(&self) -> Result<u64, CacheError> {
        let (slots, goal) = {
            let mut space = self.shared.space();
            space.on_device.retain(|slot| slot.strong_count() > 0);
            let slots: Vec<Arc<Slot>> = space.on_device.iter().filter_map(Weak::upgrade).collect();
            (slots, space.device_bytes.div_ceil(2))
        };
        let mut moved = 0;
        for slot in &slots {
            if moved >= goal {
                break;
            }
            let mut place = slot.place();
            if let Place::Device(tensor) = &*place {
                let host = self.shared.place_on_host(tensor.clone(), slot.bytes())?;
                *place = host;
                self.shared.space().device_bytes -= slot.bytes();
                moved += slot.bytes();
            }
        }
        Ok(moved)
    }
}

impl Shared {
    fn space(&self) -> std::sync::MutexGuard<'_, Space> {
        // The counters are valid after every statement, so a panic elsewhere cannot have left them half changed.
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reserve_on_device(&self, bytes: u64) -> bool {
        let mut space = self.space();
        let fits = space.device_bytes + bytes <= self.device_budget_bytes;
        if fits {
            space.device_bytes += bytes;
        }
        fits
    }

    /// In memory if it fits, else on disk.
    fn place_on_host(&self, tensor: Tensor, bytes: u64) -> Result<Place, CacheError> {
        if !self.reserve(bytes) {
            let values = tensor.flatten_all()?.to_vec1::<f32>()?;
            drop(tensor);
            return self.spill(bytemuck::cast_slice(&values));
        }
        if tensor.device().is_cpu() {
            return Ok(Place::Memory(tensor));
        }
        Pinned::copy_of(&tensor).map(Place::Pinned).map_err(|error| {
            self.space().resident_bytes -= bytes;
            error.into()
        })
    }

    fn reserve(&self, bytes: u64) -> bool {
        let mut space = self.space();
        let fits = space.resident_bytes + bytes <= self.budget_bytes;
        if fits {
            space.resident_bytes += bytes;
        }
        fits
    }

    fn spill(&self, bytes: &[u8]) -> Result<Place, CacheError> {
        let failed = |source| CacheError::Io { folder: self.folder.clone(), source };
        let length = bytes.len() as u64;
        let (file, offset) = {
            let mut space = self.space();
            let file = match &space.file {
                Some(file) => Arc::clone(file),
                // Unlinked at once: the system frees it however the process ends.
                None => {
                    let file = Arc::new(tempfile::tempfile_in(&self.folder).map_err(failed)?);
                    Arc::clone(space.file.insert(file))
                }
            };
            let offset = match space.free.get_mut(&length).and_then(Vec::pop) {
                Some(offset) => offset,
                None => {
                    space.file_bytes += length;
                    space.file_bytes - length
                }
            };
            space.spilled_bytes += length;
            (file, offset)
        };
        if let Err(source) = file.write_all_at(bytes, offset) {
            self.free_extent(length, offset);
            return Err(failed(source));
        }
        Ok(Place::Disk { file, offset })
    }

    fn free_extent(&self, length: u64, offset: u64) {
        let mut space = self.space();
        space.spilled_bytes -= length;
        if space.spilled_bytes == 0 {
            // Nothing refers to the file any more: the next spill starts an empty one.
            (space.file, space.file_bytes) = (None, 0);
            space.free.clear();
        } else {
            space.free.entry(length).or_default().push(offset);
        }
    }
}

impl Entry {
    /// The tensor `[tokens, width]`; free of charge when it is in memory.
    ///
    /// # Errors
    /// `Io`, `Backend`.
    pub fn load(&self) -> Result<Tensor, CacheError> {
        let slot = &*self.slot;
        let device = &slot.shared.device;
        let (file, offset) = match &*slot.place() {
            Place::Device(tensor) => return Ok(tensor.clone()),
            Place::Pinned(pinned) => return Ok(pinned.load((slot.rows, slot.columns))?),
            Place::Memory(tensor) => return Ok(tensor.to_device(device)?),
            Place::Disk { file, offset } => (Arc::clone(file), *offset),
        };
        let mut values = vec![0.0_f32; slot.rows * slot.columns];
        file.read_exact_at(bytemuck::cast_slice_mut(&mut values), offset)
            .map_err(|source| CacheError::Io { folder: slot.shared.folder.clone(), source })?;
        Ok(Tensor::from_vec(values, (slot.rows, slot.columns), device)?)
    }

    /// Loads the tensor and lets go of this handle, so that the cache's space is free as soon as nobody else has one.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn take(self) -> Result<Tensor, CacheError> {
        self.load()
    }

    /// `[tokens, width]`.
    pub fn shape(&self) -> (usize, usize) {
        (self.slot.rows, self.slot.columns)
    }
}

impl Slot {
    fn bytes(&self) -> u64 {
        (self.rows * self.columns * DType::F32.size_in_bytes()) as u64
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        // A place is replaced whole.
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let bytes = self.bytes();
        match *self.place() {
            Place::Device(_) => self.shared.space().device_bytes -= bytes,
            Place::Memory(_) | Place::Pinned(_) => self.shared.space().resident_bytes -= bytes,
            Place::Disk { offset, .. } => self.shared.free_extent(bytes, offset),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::ops::host;

    fn matrix(start: f32) -> Tensor {
        let values: Vec<f32> = (0..32).map(|index| start + index as f32).collect();
        Tensor::from_vec(values, (4, 8), &Device::Cpu).unwrap()
    }

    fn values(entry: &Entry) -> Vec<Vec<f32>> {
        entry.load().unwrap().to_vec2().unwrap()
    }

    #[test]
    fn what_exceeds_the_budget_comes_back_from_disk_unchanged() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ActivationCache::new(300, folder.path().to_owned());
        let entries: Vec<Entry> = (0..5).map(|index| cache.put(matrix(index as f32)).unwrap()).collect();
        assert_eq!(cache.held_bytes(), (256, 3 * 128));
        for (index, entry) in entries.iter().enumerate() {
            assert_eq!(values(entry), matrix(index as f32).to_vec2::<f32>().unwrap());
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the scratch file has no name");
    }

    #[test]
    fn space_is_free_again_when_the_last_handle_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ActivationCache::new(128, folder.path().to_owned());
        let (resident, spilled) = (cache.put(matrix(0.0)).unwrap(), cache.put(matrix(1.0)).unwrap());
        let other = spilled.clone();
        resident.take().unwrap();
        spilled.take().unwrap();
        assert_eq!(cache.held_bytes(), (0, 128));
        assert_eq!(values(&other), matrix(1.0).to_vec2::<f32>().unwrap());
        drop(other);
        assert_eq!(cache.held_bytes(), (0, 0));
    }

    #[test]
    fn what_a_gpu_has_no_room_for_comes_back_from_the_host_unchanged() {
        for device in host::devices().into_iter().filter(|device| !device.is_cpu()) {
            let cache = ActivationCache::on(device.clone(), 300, 200, std::env::temp_dir());
            let put = |index| cache.put(matrix(index as f32).to_device(&device).unwrap()).unwrap();
            // Two on the GPU, one in pinned memory, one on disk.
            let entries: Vec<Entry> = (0..4).map(put).collect();
            assert_eq!(cache.held_bytes(), (128, 128));
            assert_eq!(cache.make_room().unwrap(), 128);
            assert_eq!(cache.held_bytes(), (128, 256), "a second one does not fit in memory");
            for (index, entry) in entries.iter().enumerate() {
                assert!(entry.load().unwrap().device().same_device(&device));
                assert_eq!(values(entry), matrix(index as f32).to_vec2::<f32>().unwrap());
            }
            drop(entries);
            assert_eq!((cache.held_bytes(), cache.make_room().unwrap()), ((0, 0), 0));
        }
    }

    #[test]
    fn a_shortage_halves_what_is_under_way() {
        let cache = ActivationCache::new(0, std::env::temp_dir());
        let batches: Vec<usize> = (0..5).map(|_| cache.note_shortage(0.5)).collect();
        assert_eq!((batches.as_slice(), cache.shortages()), (&[4, 2, 1, 1, 1][..], (5, 2.5)));
    }

    #[test]
    fn freed_extents_are_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ActivationCache::new(0, folder.path().to_owned());
        let kept = cache.put(matrix(7.0)).unwrap();
        for index in 0..10 {
            drop(cache.put(matrix(index as f32)).unwrap());
        }
        assert_eq!(cache.shared.space().file_bytes, 256);
        assert_eq!(values(&kept), matrix(7.0).to_vec2::<f32>().unwrap());
    }
}
