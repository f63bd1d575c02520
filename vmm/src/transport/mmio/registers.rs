//! The registers of a virtio-mmio window (virtio 1.2, section 4.2.2) and the bits of its `Status`
//! (section 2.1).

/// Where the device's own configuration space begins.
pub(super) const CONFIGURATION: u64 = 0x100;

macro_rules! registers {
    ($($name:ident = $offset:literal,)+) => {
        /// A register, by its offset.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Register {
            $($name = $offset,)+
        }

        impl Register {
            /// The register at `offset`.
            pub fn at(offset: u64) -> Option<Self> {
                match offset {
                    $($offset => Some(Self::$name),)+
                    _ => None,
                }
            }
        }
    };
}

registers! {
    MagicValue = 0x000,
    Version = 0x004,
    DeviceId = 0x008,
    VendorId = 0x00c,
    DeviceFeatures = 0x010,
    DeviceFeaturesSel = 0x014,
    DriverFeatures = 0x020,
    DriverFeaturesSel = 0x024,
    QueueSel = 0x030,
    QueueNumMax = 0x034,
    QueueNum = 0x038,
    QueueReady = 0x044,
    QueueNotify = 0x050,
    InterruptStatus = 0x060,
    InterruptAck = 0x064,
    Status = 0x070,
    QueueDescLow = 0x080,
    QueueDescHigh = 0x084,
    QueueDriverLow = 0x090,
    QueueDriverHigh = 0x094,
    QueueDeviceLow = 0x0a0,
    QueueDeviceHigh = 0x0a4,
    ShmSel = 0x0ac,
    ShmLenLow = 0x0b0,
    ShmLenHigh = 0x0b4,
    ShmBaseLow = 0x0b8,
    ShmBaseHigh = 0x0bc,
    QueueReset = 0x0c0,
    ConfigGeneration = 0x0fc,
}

/// Bits of `Status`.
pub(super) mod device_status {
    /// The driver has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u32 = 4;
    /// Features are negotiated.
    pub const FEATURES_OK: u32 = 8;
    /// The device can't go on.
    pub const NEEDS_RESET: u32 = 0x40;
    /// The driver has given up.
    pub const FAILED: u32 = 0x80;
    /// What a driver may set.
    pub const WRITABLE: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

    /// A bit, and those that must be set before it.
    pub struct Step {
        pub value: u32,
        pub requires: u32,
    }

    /// Initialisation, in order.
    pub const IN_ORDER: [Step; 4] = [
        Step { value: ACKNOWLEDGE, requires: 0 },
        Step { value: DRIVER, requires: ACKNOWLEDGE },
        Step { value: FEATURES_OK, requires: ACKNOWLEDGE | DRIVER },
        Step { value: DRIVER_OK, requires: ACKNOWLEDGE | DRIVER | FEATURES_OK },
    ];
}
