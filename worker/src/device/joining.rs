//! Whether this worker's device can be joined with another worker's, and by what.

use std::sync::Arc;

use super::{Chosen, DeviceError, backend};
use crate::config::NcclReach;
use crate::transport::Carrier;

/// What joins the device with others', as far as it may reach.
///
/// # Errors
/// `Nccl` if other machines shall be reached, which is never so by itself, and this worker cannot.
pub fn carrier(chosen: &Chosen, reach: NcclReach) -> Result<Option<Arc<dyn Carrier>>, DeviceError> {
    if reach == NcclReach::Off {
        return Ok(None);
    }
    match backend::carrier(&chosen.device, reach == NcclReach::Cluster) {
        Ok(carrier) => Ok(Some(carrier)),
        Err(reason) if reach == NcclReach::Cluster => Err(DeviceError::Nccl { reason }),
        Err(reason) => {
            tracing::debug!(reason, "no NCCL");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use espalier_common::device::DeviceChoice;

    use super::*;
    use crate::device::open;

    #[test]
    fn what_was_asked_for_and_cannot_be_had_is_refused() {
        let chosen = open(DeviceChoice::Cpu, false).unwrap();
        assert!(carrier(&chosen, NcclReach::Off).unwrap().is_none());
        assert!(carrier(&chosen, NcclReach::Host).unwrap().is_none());
        let refusal = carrier(&chosen, NcclReach::Cluster).unwrap_err();
        assert!(refusal.to_string().contains("worker.nccl"), "{refusal}");
    }
}
