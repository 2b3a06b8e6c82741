//! The handler's part in letting somebody in by a key or a certificate.
//!
//! russh tells of an offer only its key, be it a certificate's or not, and of the certificate only after
//! the signature. So where certificates log in at all, any key may be one's: each offer is accepted, and
//! the signature of a key that is none is refused as the offer would have been, as no failure.

use hermitage_storage::accounts::KeyOptions;
use russh::{
    keys::{Algorithm, Certificate},
    server::{Auth, PublicKeyOffer, VerifiedPublicKey},
};

use super::{
    handler::ClientHandler,
    login_name::{self, Wishes},
    words::{again, shown},
};
use crate::{
    auth::{Admission, Refusal},
    lobby::Word,
    watch::{Event, Method},
};

impl ClientHandler {
    pub(super) async fn key_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Auth {
        // SHA-1 signatures are worth nothing (RFC 8332); the client tries the key again with SHA-2.
        if *offer.algorithm == (Algorithm::Rsa { hash: None }) {
            return again();
        }
        if self.server.authenticator.takes_certificates() {
            return Auth::Accept;
        }
        let Ok(blob) = offer.public_key.to_bytes() else { return again() };
        let name = login_name::parse(user).0;
        match self.server.authenticator.key(name, blob, self.peer.ip()).await {
            Ok(_) => Auth::Accept,
            Err(refusal) => {
                let key = offer.public_key.fingerprint(Default::default());
                self.refuse(user, Method::Publickey, format!("key {key}"), &refusal)
            }
        }
    }

    pub(super) async fn key_verified(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Auth {
        let (name, wishes) = login_name::parse(user);
        let fingerprint = key.public_key.fingerprint(Default::default());
        let admission = match key.public_key.to_bytes() {
            Ok(blob) if *key.algorithm != (Algorithm::Rsa { hash: None }) => {
                self.server.authenticator.key(name, blob, self.peer.ip()).await
            }
            Ok(_) => Err(Refusal::Sha1),
            Err(_) => Err(Refusal::Encode),
        };
        match admission {
            Ok(admission) => {
                self.admit(admission, wishes, Method::Publickey, format!("key {fingerprint}"))
            }
            Err(refusal) => {
                let refused =
                    self.refuse(user, Method::Publickey, format!("key {fingerprint}"), &refusal);
                match self.server.authenticator.takes_certificates() {
                    true => refused,
                    // Its offer was accepted a moment ago.
                    false => self.failed(user, Method::Publickey).await,
                }
            }
        }
    }

    pub(super) async fn certificate_verified(
        &mut self,
        user: &str,
        certificate: &Certificate,
    ) -> Auth {
        let (name, wishes) = login_name::parse(user);
        let by = format!(
            "certificate \"{}\" (serial {}) of {} for the key {}",
            shown(certificate.key_id()),
            certificate.serial(),
            certificate.signature_key().fingerprint(Default::default()),
            certificate.public_key().fingerprint(Default::default()),
        );
        match self.server.authenticator.certificate(name, certificate, self.peer.ip()).await {
            // It ends, and a password does not.
            Ok(admission) => {
                self.admit(admission, but_no_password(wishes), Method::Certificate, by)
            }
            Err(refusal) => self.refuse(user, Method::Certificate, by, &refusal),
        }
    }

    /// Clients offer what they have, so this is no failure.
    fn refuse(&self, user: &str, method: Method, by: String, refusal: &Refusal) -> Auth {
        let (peer, user) = (self.peer, shown(user));
        match refusal {
            Refusal::Unknown => tracing::debug!(%peer, user, by, "refused: {refusal}"),
            // For somebody who runs this host to repair.
            Refusal::Read { .. } | Refusal::Parse { .. } | Refusal::LookUp(_) => {
                tracing::error!(%peer, user, by, "refused: {refusal}");
            }
            _ => tracing::info!(%peer, user, by, "refused: {refusal}"),
        }
        // A key that is not known here is what every agent offers.
        if !matches!(refusal, Refusal::Unknown) {
            let (source, reason) = (peer.to_string(), refusal.to_string());
            let by = Some(by);
            self.server.watch.tell(Event::LoginRefused { user, source, method, by, reason });
        }
        again()
    }

    fn admit(
        &mut self,
        admission: Admission,
        wishes: Result<Wishes, String>,
        method: Method,
        by: String,
    ) -> Auth {
        let Admission { account, options } = admission;
        let restricted = options != KeyOptions::default();
        tracing::info!(peer = %self.peer, account = account.name, by, restricted, "login by key");
        self.by = by;
        self.tell_of_login(&account, method, restricted);
        self.wishes = match options.command {
            // Whoever may run one command does not say what becomes of the machine.
            Some(_) if wishes != Ok(Wishes::default()) => {
                Err("this login runs one command; it has no words after the account's name".into())
            }
            _ if restricted => but_no_password(wishes),
            _ => wishes,
        };
        (self.account, self.options) = (Some(account), options);
        Auth::Accept
    }
}

/// A password opens all of the account, from anywhere and for good: who may less can't make one.
fn but_no_password(wishes: Result<Wishes, String>) -> Result<Wishes, String> {
    match wishes.as_ref().ok().and_then(|wishes| wishes.lobby) {
        Some(Word::Passwd) => Err("a login by a certificate, or by a key with options, can't set a \
                                   password, which would open more than it does; use another key or \
                                   the password that there is, or ask your operator"
            .into()),
        _ => wishes,
    }
}
