//! What the backend says where something of CUDA is missing.

use phalanx_kernels::KernelError;
use phalanx_kernels::cuda::{CudaBackend, CudaUnavailable, Library, available, devices};

#[test]
fn what_is_missing_is_named_in_one_line() {
    let missing = Library::ALL.into_iter().find(|library| !library.is_present());
    let found = available();
    match missing {
        Some(missing) => {
            let error = found.unwrap_err();
            let text = error.to_string();
            assert!(
                matches!(error, CudaUnavailable::Missing { library, .. } if library == missing),
                "{text}"
            );
            assert!(
                text.starts_with(&format!("lib{} not found", missing.name())),
                "{text}"
            );
            assert!(text.contains("LD_LIBRARY_PATH") && !text.contains('\n'), "{text}");
        }
        None => assert!(
            !matches!(found, Err(CudaUnavailable::Missing { .. })),
            "{found:?}"
        ),
    }
}

/// cudarc itself panics where a library is missing.
#[test]
fn a_missing_library_is_an_error_and_no_panic() {
    for result in [devices().map(drop), CudaBackend::new(0).map(drop)] {
        match result {
            Ok(()) => assert!(Library::Cuda.is_present()),
            Err(KernelError::Device { message, .. }) => assert!(!message.is_empty()),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
#[ignore = "needs a device"]
fn a_device_describes_itself() {
    available().unwrap();
    let devices = devices().unwrap();
    for (ordinal, device) in devices.iter().enumerate() {
        assert_eq!(device.ordinal, ordinal);
        assert!(!device.name.is_empty());
        assert!(
            device.arch().starts_with("sm_") && device.compute_capability >= (8, 0),
            "{device:?}"
        );
        assert!(
            0 < device.free_bytes && device.free_bytes <= device.total_bytes,
            "{device:?}"
        );
        assert_eq!(device.pci_bus_id.len(), "00000000:00:00.0".len(), "{device:?}");
        assert!(
            device
                .peers
                .iter()
                .all(|&peer| peer < devices.len() && peer != ordinal)
        );
    }
    let beyond = devices.len();
    assert!(matches!(
        CudaBackend::new(beyond),
        Err(KernelError::Device { .. })
    ));
}
