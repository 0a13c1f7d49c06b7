//! The service of payments as a program: `payments FOLDER [ADDRESS]` prints its URL, and serves
//! until it is stopped. What it was asked for is in the folder's books, which the next one goes on
//! with.

use std::net::SocketAddr;

use hapax_tests::payments::Payments;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().expect("the folder of its books");
    std::fs::create_dir_all(&folder).expect("the folder of its books");
    let address =
        arguments.next().map_or(SocketAddr::from(([127, 0, 0, 1], 0)), |text| text.parse().expect("an address"));
    let service = Payments::listen(address, folder.as_ref());
    println!("{}", service.url());
    loop {
        std::thread::park();
    }
}
