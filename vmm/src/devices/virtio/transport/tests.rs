use super::*;
use crate::devices::virtio::{
    Block, Console,
    testing::{Driver, Line, MEMORY, memory},
};

const SETTLED: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;

struct Bare {
    device: Transport<Block>,
    line: Line,
}

impl Bare {
    fn new() -> Self {
        let line = Line::default();
        Self { device: Transport::new(Block::new(), memory(), line.clone()), line }
    }

    fn get(&self, register: u64) -> u32 {
        let mut raw = [0; 4];
        self.device.read(register, &mut raw);
        u32::from_le_bytes(raw)
    }

    fn set(&self, register: u64, value: u32) -> Result<(), Fault> {
        self.device.write(register, &value.to_le_bytes())
    }

    fn accept(&self, features: u64) -> u32 {
        self.set(register::STATUS, status::ACKNOWLEDGE | status::DRIVER).unwrap();
        for half in 0..2 {
            self.set(register::DRIVER_FEATURES_SEL, half).unwrap();
            self.set(register::DRIVER_FEATURES, (features >> (32 * half)) as u32).unwrap();
        }
        self.set(register::STATUS, SETTLED).unwrap();
        self.get(register::STATUS)
    }

    fn queue(&self, size: u32, addresses: [u64; 3]) -> Result<(), Fault> {
        self.set(register::QUEUE_SEL, 0)?;
        self.set(register::QUEUE_SIZE, size)?;
        let [descriptors, driver, device] = addresses;
        for (low, address) in [
            (register::QUEUE_DESC_LOW, descriptors),
            (register::QUEUE_DRIVER_LOW, driver),
            (register::QUEUE_DEVICE_LOW, device),
        ] {
            self.set(low, address as u32)?;
            self.set(low + 4, (address >> 32) as u32)?;
        }
        self.set(register::QUEUE_READY, 1)
    }
}

fn reason(result: Result<(), Fault>) -> String {
    match result {
        Err(Fault::Guest { device: "block", reason }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_device_says_what_it_is() {
    let bare = Bare::new();
    assert_eq!(bare.get(register::MAGIC), 0x7472_6976);
    assert_eq!(bare.get(register::VERSION), 2);
    assert_eq!(bare.get(register::DEVICE_ID), 2);
    assert_eq!(bare.get(register::SHM_LEN_LOW), u32::MAX);
    assert_eq!(bare.get(register::SHM_BASE_HIGH), u32::MAX);
    bare.set(register::QUEUE_SEL, 1).unwrap();
    assert_eq!(bare.get(register::QUEUE_SIZE_MAX), 0);
    bare.set(register::DEVICE_FEATURES_SEL, 1).unwrap();
    assert_eq!(bare.get(register::DEVICE_FEATURES), 1);
    bare.set(register::DEVICE_FEATURES_SEL, 2).unwrap();
    assert_eq!(bare.get(register::DEVICE_FEATURES), 0);
}

#[test]
fn accesses_of_odd_width_or_place_are_harmless() {
    let bare = Bare::new();
    for width in [1, 2, 3, 4, 8] {
        for offset in (0..0x180).chain([WINDOW - 1, u64::MAX - 8]) {
            let mut data = vec![0xff; width];
            bare.device.read(offset, &mut data);
            if offset < register::CONFIG && (width != 4 || !offset.is_multiple_of(4)) {
                assert!(data.iter().all(|byte| *byte == 0), "{width} bytes at {offset:#x}");
            }
            bare.device.write(offset, &data).unwrap();
        }
    }
    // Configuration may be read in any width; block size is at 20.
    let mut byte = [0];
    bare.device.read(register::CONFIG + 21, &mut byte);
    assert_eq!(byte, [2]);
}

#[test]
fn features_nobody_offered_are_not_settled() {
    let offered = Core::<Block>::OFFERED;
    assert_eq!(Bare::new().accept(offered), SETTLED);
    assert_eq!(Bare::new().accept(feature::VERSION_1), SETTLED);
    let refused = SETTLED & !status::FEATURES_OK;
    assert_eq!(Bare::new().accept(offered | 1 << 34), refused);
    assert_eq!(Bare::new().accept(offered & !feature::VERSION_1), refused);
    let bare = Bare::new();
    bare.accept(0);
    let why = reason(bare.set(register::STATUS, refused | status::DRIVER_OK));
    assert!(why.contains("settling features"), "{why}");
}

#[test]
fn rings_outside_of_memory_or_out_of_order_end_the_machine() {
    let good = [0x1000, 0x2000, 0x3000];
    let cases: &[(u32, [u64; 3])] = &[
        (0, good),
        (3, good),
        (256, good),
        (u32::MAX, good),
        (1 << 16 | 16, good),
        (16, [0x1008, 0x2000, 0x3000]),
        (16, [0x1000, 0x2001, 0x3000]),
        (16, [0x1000, 0x2000, 0x3002]),
        (16, [0x1000, 0, 0x3000]),
        (16, [MEMORY, 0x2000, 0x3000]),
        (16, [0x1000, MEMORY - 16, 0x3000]),
        (16, [0x1000, 0x2000, MEMORY - 64]),
        (16, [!0xf, 0x2000, 0x3000]),
        (16, [0x1000, !1, 0x3000]),
    ];
    for (size, addresses) in cases {
        let bare = Bare::new();
        bare.accept(feature::VERSION_1);
        let why = reason(bare.queue(*size, *addresses));
        assert!(why.starts_with("queue 0: "), "{why}");
        assert_eq!(bare.get(register::QUEUE_READY), 0);
    }
    let bare = Bare::new();
    assert!(reason(bare.queue(16, good)).contains("before features"));
    bare.accept(feature::VERSION_1);
    bare.queue(16, good).unwrap();
    assert!(reason(bare.queue(16, good)).contains("while ready"));
    // Made not ready, it may be set anew.
    bare.set(register::QUEUE_READY, 0).unwrap();
    assert_eq!(bare.get(register::QUEUE_READY), 0);
    bare.queue(32, good).unwrap();
}

#[test]
fn status_only_grows_until_reset() {
    let bare = Bare::new();
    bare.accept(feature::VERSION_1);
    assert!(reason(bare.set(register::STATUS, status::DRIVER)).contains("goes back"));
    bare.queue(16, [0x1000, 0x2000, 0x3000]).unwrap();
    bare.set(register::STATUS, SETTLED | status::DRIVER_OK).unwrap();
    bare.set(register::STATUS, 0).unwrap();
    assert_eq!(bare.get(register::STATUS), 0);
    assert_eq!(bare.get(register::QUEUE_READY), 0);
    assert!(!bare.line.is_high());
}

#[test]
fn features_do_not_change_once_settled() {
    let bare = Bare::new();
    bare.accept(feature::VERSION_1);
    bare.set(register::DRIVER_FEATURES_SEL, 0).unwrap();
    bare.set(register::DRIVER_FEATURES, u32::MAX).unwrap();
    let state = bare.device.save().unwrap();
    assert_eq!(state.driver_features, feature::VERSION_1);
}

#[test]
fn every_field_of_a_saved_state_is_checked() {
    let driver = Driver::start(Block::new());
    let good = driver.device.save().unwrap();
    let restore = |change: &dyn Fn(&mut TransportState<_>)| {
        let mut state = good.clone();
        change(&mut state);
        Transport::restore(state, Block::new(), driver.memory.clone(), Line::default()).map(drop)
    };
    assert!(restore(&|_| {}).is_ok());
    let error = restore(&|state| state.version = 99).unwrap_err();
    assert!(matches!(error, StateError::Version { found: 99, .. }), "{error}");
    type Change = dyn Fn(&mut TransportState<crate::devices::virtio::block::BlockState>);
    let wrong: &[(&str, &Change)] = &[
        ("name", &|state| state.name = "console".into()),
        ("unknown status", &|state| state.status |= 1 << 10),
        ("unsettled", &|state| state.status &= !status::FEATURES_OK),
        ("unsettled queue", &|state| state.status = 1),
        ("features", &|state| state.driver_features |= 1 << 50),
        ("no version 1", &|state| state.driver_features = 0),
        ("queues", &|state| state.queues.push(state.queues[0])),
        ("no queues", &|state| state.queues.clear()),
        ("interrupt", &|state| state.interrupt_status = 4),
        ("descriptors", &|state| state.queues[0].registers.descriptors = MEMORY),
        ("driver area", &|state| state.queues[0].registers.driver |= 1),
        ("device area", &|state| state.queues[0].registers.device = u64::MAX - 3),
        ("size", &|state| state.queues[0].registers.size = 129),
    ];
    for (what, change) in wrong {
        let result = restore(change);
        assert!(matches!(result, Err(StateError::Invalid { .. })), "{what}: {result:?}");
    }
}

#[test]
fn a_pending_interrupt_is_raised_again_by_resume_and_not_before() {
    let mut driver = Driver::start(Block::new());
    let [header, status] = [16, 1].map(|length| driver.allocate(length));
    driver.put(header, &[0xff; 16]);
    driver.submit(0, &[(header, 16, false), (status, 1, true)]).unwrap();
    assert!(driver.device.drain(Duration::from_secs(5)));
    let fork = driver.fork(Block::new());
    assert!(!fork.line.is_high());
    fork.device.resume().unwrap();
    assert_eq!(fork.acknowledge(), 1);
}

#[test]
fn a_driver_without_event_indices_is_served_and_interrupted_each_time() {
    let line = Line::default();
    let memory = memory();
    let device = Transport::new(Console::new(poller(), 1), memory.clone(), line.clone());
    let set = |register: u64, value: u32| device.write(register, &value.to_le_bytes()).unwrap();
    set(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    set(register::DRIVER_FEATURES, 1 << 1);
    set(register::DRIVER_FEATURES_SEL, 1);
    set(register::DRIVER_FEATURES, 1);
    set(register::STATUS, SETTLED);
    set(register::QUEUE_SEL, 5);
    set(register::QUEUE_DESC_LOW, 0x1000);
    set(register::QUEUE_DRIVER_LOW, 0x2000);
    set(register::QUEUE_DEVICE_LOW, 0x3000);
    set(register::QUEUE_READY, 1);
    set(register::STATUS, SETTLED | status::DRIVER_OK);
    use vm_memory::{Bytes, GuestAddress};
    memory
        .write_slice(
            &crate::devices::virtio::testing::descriptor(0x4000, 10, 0, 0),
            GuestAddress(0x1000),
        )
        .unwrap();
    for round in 1..=40u16 {
        memory.write_obj(round, GuestAddress(0x2002)).unwrap();
        set(register::QUEUE_NOTIFY, 5);
        assert!(line.is_high(), "round {round}");
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), round);
        set(register::INTERRUPT_ACK, 1);
        assert!(!line.is_high());
    }
}

fn poller() -> Arc<crate::poller::Poller> {
    Arc::new(crate::poller::Poller::new().unwrap())
}

/// An edge that falls while the guest serves the last one must not be lost, and nothing is acknowledged here.
#[test]
fn edges_come_for_each_news_without_any_acknowledgement() {
    let mut driver = Driver::start_shown(Block::new());
    let [header, status] = [16, 1].map(|length| driver.allocate(length));
    driver.put(header, &[0xff; 16]);
    for _ in 0..5 {
        driver.submit(0, &[(header, 16, false), (status, 1, true)]).unwrap();
        assert!(driver.device.drain(Duration::from_secs(5)));
        assert_eq!(driver.used(0).len(), 1);
        assert!(!driver.line.is_high(), "twice for one thing");
        assert_eq!(driver.get(register::INTERRUPT_STATUS), 1);
    }
    driver.check_page();
}

#[test]
fn a_change_of_configuration_shows_on_the_page_and_goes_with_its_acknowledgement() {
    let driver = Driver::start_shown(Block::new());
    let generation = driver.get(register::CONFIG_GENERATION);
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(512 * 0x1234).unwrap();
    driver.device.attach(disk).unwrap();
    assert_ne!(driver.get(register::CONFIG_GENERATION), generation);
    assert_eq!(driver.get(register::CONFIG), 0x1234);
    driver.check_page();
    assert_eq!(driver.acknowledge(), 2);
    assert_eq!(driver.get(register::INTERRUPT_STATUS), 0);
    assert_eq!(driver.acknowledge(), 0);
}

#[test]
fn the_page_is_right_after_a_restore_a_reset_and_a_new_start() {
    let driver = Driver::start_shown(Block::new());
    driver.check_page();
    let mut fork = driver.fork(Block::new());
    fork.check_page();
    fork.device.resume().unwrap();
    fork.check_page();
    assert_eq!(fork.get(register::STATUS), SETTLED | status::DRIVER_OK);
    fork.set(register::STATUS, 0).unwrap();
    assert_eq!(fork.get(register::STATUS), 0);
    fork.check_page();
    fork.initialise().unwrap();
    fork.check_page();
}

#[test]
fn an_edge_that_was_due_when_saved_comes_with_resume_and_not_before() {
    let mut driver = Driver::start_shown(Block::new());
    let [header, status] = [16, 1].map(|length| driver.allocate(length));
    driver.put(header, &[0xff; 16]);
    driver.submit(0, &[(header, 16, false), (status, 1, true)]).unwrap();
    assert!(driver.device.drain(Duration::from_secs(5)));
    let mut fork = driver.fork(Block::new());
    assert!(!fork.line.is_high());
    fork.device.resume().unwrap();
    assert_eq!(fork.used(0).len(), 1);
    // A fork is told once.
    assert!(!fork.line.is_high());
    fork.device.resume().unwrap();
    assert!(!fork.line.is_high());
}
