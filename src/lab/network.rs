//! A lab's network: a namespace with a bridge in it and nothing that leads out.
//!
//! The namespace stays because a file of the lab's folder is mounted from it (as `ip netns`
//! does), so that clients enter it by that path: `nsenter --net=FILE`.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::process::run_in_thread;
use crate::config::cluster::Ipv4Network;
use crate::error::UserError;

/// The bridge's name inside the namespace.
pub const BRIDGE: &str = "stanchion0";

// `linux/sockios.h`; the C library has no names for them.
const SIOCBRADDBR: libc::c_ulong = 0x89a0;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const SIOCBRDELIF: libc::c_ulong = 0x89a3;

/// The last usable address: the operator's, on the bridge.
pub fn find_operator(network: Ipv4Network) -> Ipv4Addr {
    Ipv4Addr::from_bits(network.broadcast().to_bits() - 1)
}

/// Make the namespace with its bridge, and keep it at `pin`, a file that is made.
pub fn create(network: Ipv4Network, pin: &Path) -> Result<()> {
    File::create(pin).with_context(|| format!("making {}", pin.display()))?;
    run_in_thread(|| -> Result<()> {
        // SAFETY: no memory or descriptor table is unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
            .context("making a network namespace")?;
        make_bridge(network).map_err(explain_bridge)?;
        mount_bind("/proc/thread-self/ns/net", pin)
            .with_context(|| format!("keeping the network namespace at {}", pin.display()))
    })
}

fn explain_bridge(error: io::Error) -> anyhow::Error {
    match error.raw_os_error() {
        // The kernel would have loaded its module.
        Some(libc::ENOPKG | libc::EINVAL | libc::ENOTTY) => {
            UserError::new("this machine cannot make a lab's network")
                .why("its kernel knows no bridges")
                .help(
                    "load the module `bridge`, or take a kernel with CONFIG_BRIDGE and CONFIG_VETH",
                )
                .into()
        }
        _ => anyhow::Error::new(error).context("making the lab's bridge"),
    }
}

/// Let go of the namespace at `pin`: with the last process in it, it is gone.
pub fn remove(pin: &Path) -> Result<()> {
    loop {
        match unmount(pin, UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(error) => {
                return Err(error).with_context(|| format!("unmounting {}", pin.display()));
            }
        }
    }
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", pin.display()))
        }
        _ => Ok(()),
    }
}

/// Run in the namespace at `pin`, in a thread of its own. Threads and programs that are
/// started there are inside, too.
pub fn enter<T: Send>(pin: &Path, act: impl FnOnce() -> T + Send) -> Result<T> {
    let namespace = open(pin)?;
    run_in_thread(|| {
        join(&namespace).with_context(|| format!("entering the network of {}", pin.display()))?;
        Ok(act())
    })
}

pub fn open(pin: &Path) -> Result<File> {
    File::open(pin).with_context(|| format!("opening {}", pin.display()))
}

/// Move this thread into the namespace; async-signal-safe.
pub fn join(namespace: &File) -> io::Result<()> {
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Plug an interface into the bridge, or pull it out; no matter if it is so already.
pub fn plug(pin: &Path, interface: &str, plugged: bool) -> Result<()> {
    enter(pin, || -> io::Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        let mut request = name_interface(BRIDGE);
        request.ifr_ifru.ifru_ifindex = find_index(&socket, interface)?;
        let (verb, already) = match plugged {
            true => (SIOCBRADDIF, libc::EBUSY),
            false => (SIOCBRDELIF, libc::EINVAL),
        };
        match control(&socket, verb, &mut request) {
            Err(error) if error.raw_os_error() != Some(already) => Err(error),
            _ => Ok(()),
        }
    })?
    .with_context(|| format!("plugging interface {interface}"))
}

/// In the namespace of this thread: raise the loopback, make the bridge, address it.
fn make_bridge(network: Ipv4Network) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    raise(&socket, "lo")?;
    let mut name = [0_u8; libc::IFNAMSIZ];
    name[..BRIDGE.len()].copy_from_slice(BRIDGE.as_bytes());
    // SAFETY: the argument is a name of IFNAMSIZ bytes, which the kernel only reads.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCBRADDBR, name.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Otherwise it takes the lowest of its ports', and changes when one is pulled out.
    let mut request = name_interface(BRIDGE);
    let hardware = [0x02, 0x53, 0x54, 0x41, 0x4e, 0x01].map(|byte: u8| byte as libc::c_char);
    let mut address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
    address.sa_data[..6].copy_from_slice(&hardware);
    request.ifr_ifru.ifru_hwaddr = address;
    control(&socket, libc::SIOCSIFHWADDR, &mut request)?;

    for (verb, address) in
        [(libc::SIOCSIFADDR, find_operator(network)), (libc::SIOCSIFNETMASK, find_mask(network))]
    {
        let mut request = name_interface(BRIDGE);
        request.ifr_ifru.ifru_addr = describe_address(address);
        control(&socket, verb, &mut request)?;
    }
    raise(&socket, BRIDGE)
}

fn find_mask(network: Ipv4Network) -> Ipv4Addr {
    let hosts = network.address().to_bits() ^ network.broadcast().to_bits();
    Ipv4Addr::from_bits(!hosts)
}

fn raise(socket: &UdpSocket, interface: &str) -> io::Result<()> {
    let mut request = name_interface(interface);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    control(socket, libc::SIOCSIFFLAGS, &mut request)
}

fn find_index(socket: &UdpSocket, interface: &str) -> io::Result<libc::c_int> {
    let mut request = name_interface(interface);
    control(socket, libc::SIOCGIFINDEX, &mut request)?;
    // SAFETY: the kernel has just written this field.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex })
}

/// A request about an interface (`netdevice(7)`); the name is cut to what fits.
fn name_interface(name: &str) -> libc::ifreq {
    // SAFETY: a C struct of numbers, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn describe_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut described =
        libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: [0; 14] };
    // After the port.
    for (to, from) in described.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    described
}

fn control(socket: &UdpSocket, verb: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the request is a valid `ifreq`, which is what these verbs read and write.
    match unsafe { libc::ioctl(socket.as_raw_fd(), verb, request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_has_the_last_usable_address() {
        let network = |text: &str| text.parse::<Ipv4Network>().unwrap();
        assert_eq!(find_operator(network("10.88.0.0/24")), Ipv4Addr::new(10, 88, 0, 254));
        let small = network("192.168.7.16/29");
        assert_eq!(find_operator(small), Ipv4Addr::new(192, 168, 7, 22));
        assert_eq!(find_mask(small), Ipv4Addr::new(255, 255, 255, 248));
    }
}
