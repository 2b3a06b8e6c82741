//! One machine: memory, virtual CPUs and devices, built the same way for boot and for restore.
//!
//! Threads: the main thread serves the host's sockets ([`control`]), one thread a vCPU runs the guest
//! and handles its exits, the block device has a worker once it is used.

pub mod control;
mod devices;
pub mod vcpus;

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::Instant,
};

use hermitage_vmm_proto::End;
use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use devices::{DeviceStates, Devices, RestoreDevices};
use vcpus::{VcpuError, Vcpus, lock};

use crate::{
    boot::{self, BootError},
    devices::virtio::{Fault, StateError},
    kvm::{self, KvmError, VcpuState, VmState},
    memory::{GuestMemory, layout::Layout},
    poller::{Key, Poller},
};

/// Owners of poller keys.
pub mod owner {
    pub const CONTROL: u8 = 0;
    pub const CONSOLE: u8 = 1;
    pub const VSOCK: u8 = 2;
    pub const SERIAL: u8 = 3;
    pub const END: u8 = 4;
}

#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Device(#[from] Fault),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("the disk's requests did not finish within {0:?}")]
    Drain(std::time::Duration),
    #[error(
        "the host's disk is full: {writes} of the guest's writes found no room within {limit:?}"
    )]
    NoRoom { writes: usize, limit: std::time::Duration },
    #[error("the machine's state does not decode: {0}")]
    Decode(#[source] postcard::Error),
    #[error("the machine's state has {0} bytes too many")]
    Leftover(usize),
    #[error("set up the machine's event loop: {0}")]
    Poller(#[source] io::Error),
    #[error("make a page for a device's registers: {0}")]
    Page(#[source] io::Error),
    #[error("{0}")]
    Ended(End),
}

/// Everything of a machine but memory and disk.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    pub vm: VmState,
    pub vcpus: Vec<VcpuState>,
    pub devices: DeviceStates,
}

impl MachineState {
    /// Bytes that were checked for being what was written; this checks that they make sense.
    pub fn decode(bytes: &[u8]) -> Result<Self, MachineError> {
        decode_whole(bytes)
    }
}

/// Decodes a state that has no byte too many.
pub(crate) fn decode_whole<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, MachineError> {
    let (state, rest) = postcard::take_from_bytes(bytes).map_err(MachineError::Decode)?;
    if !rest.is_empty() {
        return Err(MachineError::Leftover(rest.len()));
    }
    Ok(state)
}

pub struct Machine {
    pub memory: GuestMemory,
    pub devices: Arc<Devices>,
    pub poller: Arc<Poller>,
    end: Arc<EndCell>,
    vcpus: Vcpus,
    vm: Arc<VmFd>,
}

/// What handles a vCPU's exits. `Some` ends the machine.
pub trait Exits: Send + Sync {
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    fn mmio_write(&self, address: u64, data: &[u8]) -> Option<End>;
    fn port_read(&self, port: u16, data: &mut [u8]);
    fn port_write(&self, port: u16, data: &[u8]) -> Option<End>;
    fn end(&self, end: End);
}

/// Why the machine ended; the first reason counts.
pub struct EndCell {
    reason: Mutex<Option<End>>,
    poller: Arc<Poller>,
}

impl EndCell {
    pub fn new(poller: Arc<Poller>) -> Arc<Self> {
        Arc::new(Self { reason: Mutex::new(None), poller })
    }

    pub fn set(&self, end: End) {
        lock(&self.reason).get_or_insert(end);
        self.wake();
    }

    /// The main thread looks at the reason at each turn.
    fn wake(&self) {
        let _ = self.poller.post(Key { owner: owner::END, token: 0 });
    }
}

/// What a machine boots.
pub struct BootConfig<'a> {
    pub layout: &'a Layout,
    /// The most that its forks can have; how many of them the kernel starts is in `cmdline`.
    pub vcpus: u32,
    pub kernel: &'a mut File,
    pub initrd: &'a mut File,
    pub cmdline: &'a str,
    pub serial_log: Option<File>,
}

impl Machine {
    pub fn boot(
        kvm: &Kvm,
        memory: GuestMemory,
        config: BootConfig<'_>,
    ) -> Result<Self, MachineError> {
        let boot = boot::load(
            &memory,
            config.layout,
            config.vcpus,
            config.kernel,
            config.initrd,
            config.cmdline,
        )?;
        let vm = Arc::new(kvm::create_vm(kvm, &memory)?);
        let supported = kvm::cpuid::supported(kvm)?;
        let mut fds = Vec::new();
        for id in 0..config.vcpus {
            let vcpu = create_vcpu(&vm, id)?;
            let cpuid = kvm::cpuid::for_vcpu(&supported, id, config.vcpus);
            kvm::prepare_for_boot(&vcpu, &cpuid, (id == 0).then_some(&boot))?;
            fds.push(vcpu);
        }
        let poller = Arc::new(Poller::new().map_err(MachineError::Poller)?);
        let end = EndCell::new(poller.clone());
        let devices =
            Arc::new(Devices::new(&memory, &vm, &poller, end.clone(), config.serial_log)?);
        Self::start(memory, devices, poller, end, fds, vm)
    }

    /// Makes a machine of a base's memory and state and somebody's disk and agent stream, with the first
    /// `vcpus` of the state's. `stage` is called after each step with its name.
    pub fn restore(
        kvm: &Kvm,
        memory: GuestMemory,
        (state, vcpus): (&MachineState, usize),
        disk: File,
        agent: OwnedFd,
        stage: &mut dyn FnMut(&'static str),
    ) -> Result<Self, MachineError> {
        Self::hold(kvm, memory, (state, vcpus), disk, stage)?.run(agent)
    }

    /// The same without running it: nothing has reached guest or disk.
    pub fn hold(
        kvm: &Kvm,
        memory: GuestMemory,
        (state, vcpus): (&MachineState, usize),
        disk: File,
        stage: &mut dyn FnMut(&'static str),
    ) -> Result<Held, MachineError> {
        let (vm, fds) = Self::restore_kvm(kvm, &memory, (state, vcpus), stage)?;
        let poller = Arc::new(Poller::new().map_err(MachineError::Poller)?);
        let end = EndCell::new(poller.clone());
        let devices = Arc::new(Devices::restore(RestoreDevices {
            state: &state.devices,
            io_apic: &state.vm.io_apic,
            memory: &memory,
            vm: &vm,
            poller: &poller,
            end: end.clone(),
            disk,
        })?);
        stage("restore devices");
        Ok(Held { memory, devices, poller, end, fds, vm })
    }

    /// Whether this host's KVM takes the state: all of it that is not a device's. Nothing runs.
    pub fn rehearse_restore(
        kvm: &Kvm,
        memory: &GuestMemory,
        state: &MachineState,
    ) -> Result<(), MachineError> {
        Self::restore_kvm(kvm, memory, (state, state.vcpus.len()), &mut |_| ()).map(drop)
    }

    fn restore_kvm(
        kvm: &Kvm,
        memory: &GuestMemory,
        (state, vcpus): (&MachineState, usize),
        stage: &mut dyn FnMut(&'static str),
    ) -> Result<(Arc<VmFd>, Vec<VcpuFd>), MachineError> {
        let vm = Arc::new(kvm::create_bare_vm(kvm)?);
        stage("create VM");
        kvm::map_memory(&vm, memory)?;
        stage("map memory");
        let mut fds = Vec::new();
        for id in 0..state.vcpus.len().min(vcpus) as u32 {
            fds.push(create_vcpu(&vm, id)?);
        }
        stage("create vCPUs");
        for (vcpu, state) in fds.iter().zip(&state.vcpus) {
            kvm::restore_vcpu(vcpu, state)?;
        }
        // After the local APICs: what is pending in the I/O APIC is delivered to them at once.
        kvm::restore_vm(&vm, &state.vm)?;
        stage("set KVM state");
        Ok((vm, fds))
    }

    fn start(
        memory: GuestMemory,
        devices: Arc<Devices>,
        poller: Arc<Poller>,
        end: Arc<EndCell>,
        fds: Vec<VcpuFd>,
        vm: Arc<VmFd>,
    ) -> Result<Self, MachineError> {
        let exits: Arc<dyn Exits> = devices.clone();
        let vcpus = Vcpus::start(fds, &exits)?;
        Ok(Self { memory, devices, poller, end, vcpus, vm })
    }

    /// Returns when no vCPU is in the guest any more.
    pub fn pause(&self) -> Result<(), MachineError> {
        Ok(self.vcpus.pause()?)
    }

    /// For an error about a guest that does not get on: where its CPUs are. It is paused afterwards.
    pub fn where_it_stands(&self) -> String {
        if let Err(error) = self.vcpus.pause() {
            return error.to_string();
        }
        let place = |(n, vcpu): (usize, &Arc<Mutex<VcpuFd>>)| match kvm::place(&lock(vcpu)) {
            Ok(place) => format!("CPU {n} {place}"),
            Err(error) => format!("CPU {n}: {error}"),
        };
        let places: Vec<_> = self.vcpus.fds.iter().enumerate().map(place).collect();
        places.join(", ")
    }

    /// Pauses the vCPUs, then the devices, and takes everybody's state. The machine stays paused.
    /// `fresh` are the registers that its vCPUs started with ([`kvm::fresh_msrs`]).
    pub fn pause_and_save(
        &self,
        fresh: &[kvm_msr_entry],
        stage: &mut dyn FnMut(&'static str),
    ) -> Result<MachineState, MachineError> {
        self.vcpus.pause()?;
        stage("pause vCPUs");
        if let Some(end) = self.ended() {
            return Err(MachineError::Ended(end));
        }
        let devices = self.devices.save()?;
        stage("drain devices");
        let vm = kvm::save_vm(&self.vm)?;
        let mut vcpus = Vec::with_capacity(self.vcpus.fds.len());
        for vcpu in &self.vcpus.fds {
            vcpus.push(kvm::save_vcpu(&lock(vcpu), fresh)?);
        }
        kvm::align_tscs(&mut vcpus);
        stage("take KVM state");
        Ok(MachineState { vm, vcpus, devices })
    }

    /// Lets a paused machine run on. One that runs is left alone.
    pub fn go_on(&self) {
        if !self.vcpus.is_paused() {
            return;
        }
        for vcpu in &self.vcpus.fds {
            // One that did not pause in time has its lock, and needs no telling.
            let Ok(vcpu) = vcpu.try_lock() else { continue };
            if let Err(error) = kvm::mark_stopped(&vcpu) {
                tracing::warn!(%error, "tell the guest that it was paused");
            }
        }
        self.vcpus.resume();
    }

    /// When the last vCPU first entered the guest.
    pub fn entered(&self) -> Instant {
        self.vcpus.entered
    }

    /// CPU time used by the guest.
    pub fn cpu_time(&self) -> std::time::Duration {
        self.vcpus.cpu_time().iter().sum()
    }

    /// Why the machine ended, if it has.
    pub fn ended(&self) -> Option<End> {
        lock(&self.end.reason).clone()
    }

    /// Ends the machine.
    pub fn end(&self, end: End) {
        self.end.set(end);
    }

    /// Makes the thread that waits for events look around.
    pub fn wake(&self) {
        self.end.wake();
    }

    /// The same, for another thread.
    pub fn waker(&self) -> impl Fn() + Send + use<> {
        let end = self.end.clone();
        move || end.wake()
    }
}

/// A machine that is whole and has not run.
pub struct Held {
    memory: GuestMemory,
    devices: Arc<Devices>,
    poller: Arc<Poller>,
    end: Arc<EndCell>,
    fds: Vec<VcpuFd>,
    vm: Arc<VmFd>,
}

impl Held {
    /// It is made of a snapshot, not only of the base.
    pub fn set_resumed(&self) {
        self.devices.balloon.set_resumed();
    }

    /// Tells the guest that its clock has stood still, so that it does not take a CPU for stuck.
    pub fn mark_stopped(&self) -> Result<(), MachineError> {
        Ok(self.fds.iter().try_for_each(kvm::mark_stopped)?)
    }

    /// Starts it, with the host's end of its agent's control connection.
    pub fn run(self, agent: OwnedFd) -> Result<Machine, MachineError> {
        self.devices.resume(agent)?;
        Machine::start(self.memory, self.devices, self.poller, self.end, self.fds, self.vm)
    }
}

fn create_vcpu(vm: &VmFd, id: u32) -> Result<VcpuFd, KvmError> {
    vm.create_vcpu(u64::from(id))
        .map_err(|source| KvmError::Ioctl { call: "KVM_CREATE_VCPU", source })
}
