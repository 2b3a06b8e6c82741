//! Passwords: argon2id, and the same work whether or not there is anything to compare with.

use argon2::password_hash::{
    self, PasswordHasher,
    phc::{Output, PasswordHash},
};
use argon2::{Algorithm, Argon2, Block, Params, Version};

/// OWASP's first recommendation for argon2id: 19 MiB, two passes, one lane.
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;

/// Shorter ones fall to guessing whatever the hash. For who sets one: none is refused for it at a login.
pub const MIN_PASSWORD: usize = 8;

/// Longer ones are refused before any work: the hash reads all of it.
pub const MAX_PASSWORD: usize = 1024;

/// A hash that nothing matches, made with the parameters above; its password was random and not kept.
/// A constant, because making one at first use would make the first unknown user cost twice.
const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$tADriiEtTJAqnC5mXaFaqQ$nQewTROgDfIzMn9L+BtfnuBEAwKqeTjzLZPAlgoAPPk";

#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    #[error("the password is empty")]
    Empty,
    #[error("the password has {0} bytes; at most {MAX_PASSWORD} are allowed")]
    TooLong(usize),
    #[error("the password could not be hashed: {0}")]
    Hash(password_hash::Error),
    #[error("it is no argon2id hash that this program would make or afford")]
    Foreign,
}

fn argon2() -> Result<Argon2<'static>, password_hash::Error> {
    let params = Params::new(MEMORY_KIB, PASSES, LANES, None)
        .map_err(|_| password_hash::Error::ParamsInvalid)?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

/// The PHC string to store. Takes some 20 ms and 19 MiB.
pub fn hash_password(password: &[u8]) -> Result<String, PasswordError> {
    match password.len() {
        0 => return Err(PasswordError::Empty),
        n if n > MAX_PASSWORD => return Err(PasswordError::TooLong(n)),
        _ => {}
    }
    let hash = argon2().and_then(|argon2| argon2.hash_password(password));
    Ok(hash.map_err(PasswordError::Hash)?.to_string())
}

/// Most that a hash from elsewhere may make each login cost, in KiB and passes.
const MOST_MEMORY_KIB: u32 = 64 * 1024;
const MOST_PASSES: u32 = 16;

/// Whether a hash that somebody else made can be stored: it says itself what verifying it costs.
pub fn check_hash(hash: &str) -> Result<(), PasswordError> {
    let parsed = PasswordHash::new(hash).map_err(|_| PasswordError::Foreign)?;
    let params = Params::try_from(&parsed).map_err(|_| PasswordError::Foreign)?;
    let whole = parsed.algorithm.as_str() == Algorithm::Argon2id.as_str()
        && parsed.salt.is_some()
        && parsed.hash.is_some();
    let dear = params.m_cost() > MOST_MEMORY_KIB
        || params.t_cost() > MOST_PASSES
        || params.p_cost() > MOST_PASSES;
    if whole && !dear { Ok(()) } else { Err(PasswordError::Foreign) }
}

/// Whether the password fits the stored hash. Without one (unknown user, no password set, account
/// disabled) or with one that can't be read, the same work is done against a hash that nothing
/// matches, so that the answer's time says nothing about who exists.
///
/// Blocks for some 20 ms and takes 19 MiB: bound how many run at once.
pub fn verify_password(stored: Option<&str>, password: &[u8]) -> bool {
    let parsed = stored.and_then(|hash| PasswordHash::new(hash).ok());
    let real = parsed.is_some() && password.len() <= MAX_PASSWORD;
    let Some(hash) = parsed.or_else(|| PasswordHash::new(NOBODY).ok()) else {
        return false;
    };
    let password = &password[..password.len().min(MAX_PASSWORD)];
    fits(password, &hash).unwrap_or(false) && real
}

fn fits(password: &[u8], hash: &PasswordHash) -> Result<bool, password_hash::Error> {
    let (Some(salt), Some(expected)) = (&hash.salt, &hash.hash) else {
        return Ok(false);
    };
    let algorithm = Algorithm::try_from(hash.algorithm.as_str())?;
    let version = hash.version.map_or(Ok(Version::default()), Version::try_from)?;
    let params = Params::try_from(hash)?;
    let mut memory = working_memory(params.block_count());
    let mut output = [0; Output::MAX_LENGTH];
    let output = output.get_mut(..expected.len()).ok_or(password_hash::Error::OutputSize)?;
    Argon2::new(algorithm, version, params).hash_password_into_with_memory(
        password,
        salt,
        output,
        &mut memory,
    )?;
    // Output compares in constant time.
    let computed = Output::new(output).map_err(|_| password_hash::Error::OutputSize)?;
    Ok(computed == *expected)
}

/// Room for so many blocks, in a buffer that goes back to the system when it is dropped. glibc learns
/// from a freed buffer of up to 32 MiB (M_MMAP_THRESHOLD in mallopt(3)) to keep the next ones in the
/// arena of the thread that asks: after some guesses 19 MiB would stay with each of the service's
/// threads. Larger ones are always given back, and what isn't touched of them costs nothing.
fn working_memory(blocks: usize) -> Vec<Block> {
    const LARGER: usize = 33 << 20;
    let mut memory = Vec::with_capacity(blocks.max(LARGER / Block::SIZE));
    memory.resize(blocks, Block::default());
    memory
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_password_fits_its_hash_only() {
        let hash = hash_password(b"correct horse").unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert_ne!(hash, hash_password(b"correct horse").unwrap(), "salted");
        assert!(verify_password(Some(&hash), b"correct horse"));
        assert!(!verify_password(Some(&hash), b"correct hors"));
        assert!(!verify_password(None, b"correct horse"));
        assert!(!verify_password(Some("nonsense"), b"correct horse"));
        assert!(!verify_password(Some(&hash), b""));
    }

    #[test]
    fn a_hash_from_elsewhere_must_be_one_that_can_be_afforded() {
        check_hash(&hash_password(b"x").unwrap()).unwrap();
        check_hash(NOBODY).unwrap();
        for bad in [
            String::new(),
            "!".into(),
            "$6$salt$hash".into(),
            NOBODY.replace("argon2id", "argon2i"),
            NOBODY.replace("m=19456", "m=4000000"),
            NOBODY.replace("t=2", "t=2000000"),
            NOBODY.rsplit_once('$').unwrap().0.to_owned(),
        ] {
            assert!(check_hash(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn impossible_passwords_are_refused() {
        assert!(matches!(hash_password(b""), Err(PasswordError::Empty)));
        let long = vec![b'x'; MAX_PASSWORD + 1];
        assert!(matches!(hash_password(&long), Err(PasswordError::TooLong(n)) if n == long.len()));
        let hash = hash_password(&long[1..]).unwrap();
        assert!(!verify_password(Some(&hash), &long), "its first 1024 bytes fit, it does not");
    }

    /// The work of a refusal is the dummy's parameters: they must be those of a real hash.
    #[test]
    fn nobody_costs_what_somebody_costs() {
        let real = hash_password(b"x").unwrap();
        let parameters = |hash: &str| hash.rsplitn(3, '$').nth(2).unwrap().to_owned();
        assert_eq!(parameters(NOBODY), parameters(&real));
        let parsed = PasswordHash::new(NOBODY).unwrap();
        let real_parsed = PasswordHash::new(&real).unwrap();
        assert_eq!(parsed.hash.unwrap().len(), real_parsed.hash.unwrap().len());

        // And the work is really done: 19 MiB can't be filled in no time, however fast the machine. A
        // busy machine only makes it longer, so this can't fail by chance.
        let without = timed(|| assert!(!verify_password(None, b"y")));
        assert!(without > Duration::from_micros(500), "a refusal of nobody took {without:?}");
    }

    fn timed(work: impl FnOnce()) -> Duration {
        let start = Instant::now();
        work();
        start.elapsed()
    }
}
