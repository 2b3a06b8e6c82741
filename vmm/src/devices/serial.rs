//! ttyS0: the kernel's console and the way in when nothing else works.
//!
//! The 16550A itself is `vm-superio`'s. What it says goes to a log of bounded size and, while an
//! operator looks, to a socket; an operator who does not read loses output rather than stop the guest
//! (a UART has no other choice).

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read as _, Write},
    os::fd::OwnedFd,
    os::unix::net::UnixStream,
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use vm_superio::{Serial, SerialState, Trigger, serial::NoEvents};

use super::virtio::{Interrupt, StateError};
use crate::poller::{Event, Interest, Key, Poller};

/// First of the eight ports.
pub const BASE_PORT: u16 = 0x3f8;

/// Bytes of output kept.
pub const LOG_BYTES: usize = 64 * 1024;

pub struct SerialConsole {
    uart: Serial<Pulse, NoEvents, Output>,
    poller: Arc<Poller>,
    key: Key,
    watching: bool,
    /// The operator's input is at its end.
    input_ended: bool,
}

/// The UART's registers (`vm-superio`'s own state type has no serde) and what the guest has said.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct SerialConsoleState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
    log: Vec<u8>,
}

/// The UART's interrupt is an ISA one: edge-triggered.
struct Pulse(Arc<dyn Interrupt>);

impl Trigger for Pulse {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse()
    }
}

#[derive(Default)]
struct Output {
    log: VecDeque<u8>,
    file: Option<File>,
    operator: Option<UnixStream>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if self.log.len() == LOG_BYTES {
                self.log.pop_front();
            }
            self.log.push_back(byte);
        }
        if let Some(file) = &mut self.file {
            file.write_all(bytes)?;
        }
        if let Some(operator) = &mut self.operator {
            // Not ready, or gone: see the module's comment.
            let _ = operator.write(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialConsole {
    /// `log_file` gets everything too (base builds).
    pub fn new(
        interrupt: Arc<dyn Interrupt>,
        poller: Arc<Poller>,
        key: Key,
        log_file: Option<File>,
    ) -> Self {
        let output = Output { file: log_file, ..Default::default() };
        Self {
            uart: Serial::new(Pulse(interrupt), output),
            poller,
            key,
            watching: false,
            input_ended: false,
        }
    }

    pub fn save(&self) -> SerialConsoleState {
        let uart = self.uart.state();
        SerialConsoleState {
            baud_divisor: [uart.baud_divisor_low, uart.baud_divisor_high],
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            input: uart.in_buffer,
            log: self.tail(LOG_BYTES),
        }
    }

    /// After the interrupt controllers have their state: a pending interrupt is raised again.
    pub fn restore(
        state: &SerialConsoleState,
        interrupt: Arc<dyn Interrupt>,
        poller: Arc<Poller>,
        key: Key,
    ) -> Result<Self, StateError> {
        let wrong = |reason: String| StateError::Invalid { device: "serial", reason };
        if state.log.len() > LOG_BYTES {
            return Err(wrong(format!("a log of {} bytes", state.log.len())));
        }
        let registers = SerialState {
            baud_divisor_low: state.baud_divisor[0],
            baud_divisor_high: state.baud_divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let output = Output { log: state.log.iter().copied().collect(), ..Default::default() };
        let uart = Serial::from_state(&registers, Pulse(interrupt), NoEvents, output)
            .map_err(|e| wrong(format!("{e:?}")))?;
        Ok(Self { uart, poller, key, watching: false, input_ended: false })
    }

    /// The guest reads register `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.uart.read(offset);
        self.watch();
        value
    }

    /// The guest writes register `offset` (0 to 7). The UART's own errors are a full input buffer in
    /// loop-back mode and a failing interrupt: the byte is lost, as on the wire.
    pub fn write(&mut self, offset: u8, value: u8) {
        let _ = self.uart.write(offset, value);
    }

    /// Gives the console to an operator: first the log, then what comes.
    pub fn attach(&mut self, socket: OwnedFd) -> io::Result<()> {
        self.detach();
        let mut operator = UnixStream::from(socket);
        operator.set_nonblocking(true)?;
        let output = self.uart.writer_mut();
        let (head, tail) = output.log.as_slices();
        let _ = operator.write(head).and_then(|_| operator.write(tail));
        self.poller.add(&operator, self.key, Interest::READ)?;
        self.watching = true;
        self.input_ended = false;
        output.operator = Some(operator);
        Ok(())
    }

    /// The operator's socket has something (or has ended).
    pub fn ready(&mut self, event: &Event) {
        if event.hangup {
            return self.detach();
        }
        let room = self.uart.fifo_capacity();
        let mut bytes = [0; 64];
        let Some(operator) = &mut self.uart.writer_mut().operator else {
            return;
        };
        if room == 0 {
            self.set_watching(false);
            return;
        }
        let wanted = room.min(bytes.len());
        match operator.read(&mut bytes[..wanted]) {
            // No more input; output goes on until the operator hangs up.
            Ok(0) => {
                self.input_ended = true;
                self.set_watching(false);
            }
            Ok(n) => {
                let _ = self.uart.enqueue_raw_bytes(&bytes[..n]);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.detach(),
        }
    }

    /// The last bytes of output, for reports of what went wrong.
    pub fn tail(&self, bytes: usize) -> Vec<u8> {
        let log = &self.uart.writer().log;
        log.iter().skip(log.len().saturating_sub(bytes)).copied().collect()
    }

    /// Reads input again once the guest has made room.
    fn watch(&mut self) {
        if !self.watching
            && !self.input_ended
            && self.uart.writer().operator.is_some()
            && self.uart.fifo_capacity() > 0
        {
            self.set_watching(true);
        }
    }

    fn set_watching(&mut self, on: bool) {
        let interest = if on { Interest::READ } else { Interest::NONE };
        if let Some(operator) = &self.uart.writer().operator
            && self.poller.modify(operator, self.key, interest).is_ok()
        {
            self.watching = on;
        }
    }

    fn detach(&mut self) {
        if let Some(operator) = self.uart.writer_mut().operator.take() {
            let _ = self.poller.remove(&operator);
        }
        self.watching = false;
    }
}
